"""The two ways to evaluate a random program: as its user writes it, and written out with an offset at every use.

`Plain` runs the program with JAX's own loops, branches and transformations, with or without kron's marks. `Reference` runs
the same layers without kron: it unrolls every loop, adds a zero offset to the result of every linear operation, and gives
every example its own copy of every other parameter. It records what each of these uses reads.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kronmesh import kron


class Param(NamedTuple):
  """A parameter and the numbers of its entries, which follow it through slices and layouts. Used by `Reference` only."""

  value: Any
  ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Mark:
  """Describes one observed output: its likelihood, how many axes an event has, and how many observations count."""

  kind: str
  event_ndims: int
  variance: float = 1.0
  count: float = 0.0


def softplus_loss(z, y):
  """A convex loss of one observation that no named likelihood has."""
  return jnp.logaddexp(z, 0).sum() + 0.5 * (z.sum() - y.sum()) ** 2


def term(mark, z, y):
  """Returns the negative log-likelihood of every observation."""
  event = tuple(range(z.ndim - mark.event_ndims, z.ndim))
  if mark.kind == 'categorical':
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]
  if mark.kind == 'bernoulli':
    return (jnp.logaddexp(z, 0) - y * z).sum(event)
  if mark.kind == 'loss':
    leading = z.shape[: z.ndim - mark.event_ndims]
    flat = jax.vmap(softplus_loss)(z.reshape(-1, *z.shape[len(leading) :]), y.reshape(-1, *y.shape[len(leading) :]))
    return flat.reshape(leading)
  return 0.5 / mark.variance * ((z - y) ** 2).sum(event)


class Plain:
  """Evaluates a program as a user writes it."""

  unrolled = False

  def __init__(self, marked=True, average=None):
    self.marked, self.batched = marked, True
    self.average = average or (lambda total, count: total / count)

  jit = staticmethod(jax.jit)
  remat = staticmethod(jax.checkpoint)
  scan = staticmethod(jax.lax.scan)
  switch = staticmethod(jax.lax.switch)

  def vmap(self, fn, *xs, examples=True):
    """jax.vmap; inside of it `batched` says whether arrays still lead with examples."""
    batched, self.batched = self.batched, self.batched and not examples
    result = jax.vmap(fn)(*xs)
    self.batched = batched
    return result

  def used(self, x, where):
    return kron.used(x, where) if self.marked else x

  def value(self, p):
    return p

  def layout(self, fn, *ps):
    return fn(*ps)

  def effective(self, p, fn):
    return fn(p)

  def linear(self, y, *_, **__):
    return y

  def free(self, p, x, axis=0, shift=False):
    return p

  def result(self, y, arrange):
    return y

  def bias(self, y, p, arrange, axis=0):
    return y + p

  def observe(self, mark, index, z, y, mask, weight):
    if not self.marked:
      return z
    more = {} if mask is None else {'mask': mask}
    more |= {} if weight is None else {'weight': weight}
    if mark.kind == 'categorical':
      return kron.observe.categorical(z, y, **more)
    if mark.kind == 'bernoulli':
      return kron.observe.bernoulli(z, y, event_ndims=mark.event_ndims, **more)
    if mark.kind == 'loss':
      return kron.observe.loss(z, softplus_loss, y, event_ndims=mark.event_ndims, **more)
    return kron.observe.gaussian(z, y, variance=mark.variance, event_ndims=mark.event_ndims, **more)


class Linear(NamedTuple):
  """One use of a kernel.

  rows: (slots, uses, inputs). ids: the numbers of the kernel's entries, (slots, inputs, outputs). arrange: lays an array
  shaped like the result out as (slots, uses, outputs). where: which uses count, (slots, uses). bias: the numbers of the
  entries of the bias that is added, (slots, outputs). one_hot: whether `where` says which rows of a table are not empty: it
  holds where kron sees a table, whose A is a diagonal; else all rows count.
  """

  offset: int
  rows: Any
  ids: np.ndarray
  arrange: Any
  where: Any
  columns: Any
  one_hot: bool = False
  bias: np.ndarray | None = None


class Free(NamedTuple):
  """One use of a parameter that is no kernel: its entries' numbers, and which axis of its offset counts examples."""

  offset: int
  ids: np.ndarray
  axis: int | None


class Observed(NamedTuple):
  mark: int
  z: Any
  weight: Any


class Reference(Plain):
  """Evaluates a program written out. `scaled`: marks multiply cotangents by the root of their number of observations."""

  unrolled = True

  def __init__(self, offsets=None, scaled=False):
    super().__init__(marked=False)
    self.offsets, self.scaled = offsets, scaled
    self.shapes, self.uses, self.observed = [], [], []
    self.results = {}  # of the linear operations, by identity: the use, its layout, and the array itself

  def jit(self, fn):
    return fn

  remat = jit

  def scan(self, body, carry, xs, reverse=False):
    length, ys = len(jax.tree.leaves(xs)[0]), []
    for t in reversed(range(length)) if reverse else range(length):
      carry, y = body(carry, jax.tree.map(lambda a, t=t: a[t], xs))
      ys.append(y)
    ys = ys[::-1] if reverse else ys
    return carry, None if ys[0] is None else jax.tree.map(lambda *y: jnp.stack(y), *ys)

  def vmap(self, fn, *xs, examples=True):
    batched, self.batched = self.batched, self.batched and not examples
    length = len(jax.tree.leaves(xs)[0])
    results = [fn(*jax.tree.map(lambda a, t=t: a[t], xs)) for t in range(length)]
    self.batched = batched
    return jax.tree.map(lambda *y: jnp.stack(y), *results)

  def switch(self, index, branches, *xs):
    return branches[int(index)](*xs)

  def value(self, p):
    return p.value

  def layout(self, fn, *ps):
    with jax.ensure_compile_time_eval():
      ids = np.asarray(fn(*(p.ids for p in ps)))
    return Param(fn(*(p.value for p in ps)), ids)

  def effective(self, p, fn):
    return Param(fn(p.value), p.ids)

  def add_offset(self, shape):
    self.shapes.append(tuple(shape))
    index = len(self.shapes) - 1
    return index, jnp.zeros(shape) if self.offsets is None else self.offsets[index]

  def linear(self, y, rows, ids, arrange, where=None, columns=None, one_hot=False):
    index, offset = self.add_offset(y.shape)
    self.uses.append(Linear(index, rows, ids, arrange, where, columns, one_hot))
    return y + offset

  def result(self, y, arrange):
    """Remembers that y is the last use's result and nothing else, so that what is added to it is a bias of the kernel."""
    self.results[id(y)] = len(self.uses) - 1, arrange, y
    return y

  def free(self, p, x, axis=0, shift=False):
    """The parameter, a copy for each example; `axis` of x counts these. shift: it is added to x."""
    if shift and id(x) in self.results:
      k, arrange, _ = self.results[id(x)]
      self.add_bias(k, p, arrange, x)
    shape = [1] * (x.ndim - p.ids.ndim) + list(p.ids.shape)
    if self.batched:
      assert shape[axis] == 1, 'the parameter has an axis where the examples are'
      shape[axis] = x.shape[axis]
    index, offset = self.add_offset(shape)
    self.uses.append(Free(index, p.ids.reshape(-1), axis if self.batched else None))
    return p.value + offset

  def bias(self, y, p, arrange, axis=0):
    """Adds a bias to the result of the kernel that was used last."""
    self.add_bias(-1, p, arrange, y)
    return y + self.free(p, y, axis)

  def add_bias(self, k, p, arrange, y):
    with jax.ensure_compile_time_eval():
      ids = np.asarray(arrange(np.broadcast_to(p.ids, y.shape)))[:, 0]
    self.uses[k] = self.uses[k]._replace(bias=ids)

  def observe(self, mark, index, z, y, mask, weight):
    self.observed.append(Observed(index, z, _weight(z, mark, mask, weight)))
    if self.scaled:
      root = float(np.sqrt(mark.count))
      z = root * z + jax.lax.stop_gradient((1 - root) * z)
    return z


def _weight(z, mark, mask, weight):
  leading = z.shape[: z.ndim - mark.event_ndims]
  total = jnp.ones(leading) if mask is None else jnp.asarray(mask, jnp.float64)
  return jnp.broadcast_to(total * (1.0 if weight is None else weight), leading)

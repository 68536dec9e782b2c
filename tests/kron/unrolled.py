"""Factors the slow way, for any program: loops unrolled, calls inlined, and every use of a parameter differentiated apart.

With none of the code under test: operations are evaluated one by one. A use is an operation in which a value made of
parameters alone meets one that depends on the batch. A linear use gets an offset added to its result, whose gradient is
dy; its rows are the derivatives of the result with respect to the parameter. In any other use every example has a switch,
through which alone the gradient with respect to that example's copy of the parameter flows.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.interpreters.partial_eval import dce_jaxpr

from tests.draws import normal

LINEAR = ('dot_general', 'conv_general_dilated', 'gather')


class Value:
  """A number with what it depends on: `params` (indices of leaves) and whether the batch takes part.

  still: the same number, of whose making parameters learn nothing.
  constant: the number of the program that a parameter was multiplied by to make it, if so.
  """

  def __init__(self, x, params=frozenset(), batch=False, still=None, constant=None):
    self.x, self.params, self.batch, self.constant = x, params, batch, constant
    self.still = x if still is None else still


class Unrolled:
  """The uses of `fn(params, *args)`; `examples` is the length of the batch's leading axis, unlike other lengths.

  state: positions of the arguments that hold no examples.
  """

  def __init__(self, fn, params, args, examples, state=()):
    self.leaves, self.treedef = jax.tree.flatten(params)
    paths = jax.tree_util.tree_leaves_with_path(params)
    self.names = [jax.tree_util.keystr(k, simple=True, separator='/') for k, _ in paths]
    self.fn, self.args, self.state = fn, args, state
    self.closed = jax.make_jaxpr(fn)(params, *args)
    outputs = [True] * len(self.closed.jaxpr.outvars)
    self.jaxpr, _ = dce_jaxpr(self.closed.jaxpr, outputs, instantiate=True)
    self.data = jax.tree.leaves(args)
    self.batched = [i not in state for i, a in enumerate(args) for _ in jax.tree.leaves(a)]
    self.n = examples
    self.decisions = None
    self.run(self.leaves)
    self.decisions = self.decided
    self.found = self.uses
    self.ids, start = [], 1
    for leaf in self.leaves:
      self.ids.append(jnp.arange(start, start + leaf.size, dtype=jnp.float32).reshape(leaf.shape))
      start += leaf.size
    numbered = jax.jit(self.kernels)(self.ids)
    for use, numbers, rows in zip(self.found, numbered, self.jacobians(), strict=True):
      use['ids'], use['jacobians'] = np.real(np.asarray(numbers)).astype(np.float64), rows

  def kernels(self, leaves):
    """What takes the kernel's place in every linear use."""
    self.run(leaves)
    return [use['x'][use['position']] if use['linear'] else () for use in self.uses]

  def jacobians(self):
    """Of every linear use's flat result with respect to its flat kernel: at its inputs, and at others."""

    def of(eqn, i, x, w):
      whole = lambda w: bind(eqn, [*x[:i], w, *x[i:]])[0].reshape(-1)  # noqa: E731
      mode = jax.jacfwd if w.size < np.prod(eqn.outvars[0].aval.shape) else jax.jacrev
      return mode(whole, holomorphic=jnp.iscomplexobj(w))(w).reshape(-1, w.size)

    def all_of(inputs):
      return [[of(u['eqn'], u['position'], x, w) for x, w in own] for u, own in zip(linear, inputs, strict=True)]

    linear = [use for use in self.found if use['linear']]
    inputs = []
    for use in linear:
      x = list(use['x'])
      w = x.pop(use['position'])
      inputs.append([(x, w), ([like(v) for v in x], w)])
    found = iter(jax.jit(all_of)(inputs))
    return [[np.asarray(j) for j in next(found)] if use['linear'] else () for use in self.found]

  def gradients(self):
    """dy of every linear use (of the summed loss), and of every other use the examples' gradients by leaf."""
    offsets = [jnp.zeros(u['shape'], u['dtype']) if u['linear'] else jnp.zeros(()) for u in self.found]
    dy = jax.jit(jax.grad(lambda o: self.run(self.leaves, o)[0].x * self.n))(offsets)
    others = [k for k, u in enumerate(self.found) if not u['linear']]
    if not others:
      return dy, {}
    lengths = [self.found[k]['rows'] for k in others]
    starts = np.cumsum([0, *lengths])
    single = jnp.eye(starts[-1])
    switches = {k: single[:, a : a + n] for k, a, n in zip(others, starts, lengths, strict=False)}
    involved = sorted({p for k in others for p in self.found[k]['params']})

    def loss(chosen, switches):
      leaves = [chosen.get(i, jax.lax.stop_gradient(x)) for i, x in enumerate(self.leaves)]
      return self.run(leaves, None, switches)[0].x * self.n

    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))({i: self.leaves[i] for i in involved}, switches)
    each = {}
    for k, a, n in zip(others, starts, lengths, strict=False):
      each[k] = {p: np.asarray(grads[p][a : a + n], np.float64) for p in self.found[k]['params']}
    return dy, each

  def alone(self, param):
    """The gradients of a parameter by example, each the only one of its batch: for parameters that kernels are made of."""
    params = self.treedef.unflatten(self.leaves)
    one = lambda i: [a if k in self.state else jax.tree.map(lambda x: x[i : i + 1], a) for k, a in enumerate(self.args)]  # noqa: E731
    grads = [jax.tree.leaves(jax.grad(self.fn)(params, *one(i)))[param] for i in range(self.n)]
    return np.asarray(jnp.stack(grads), np.float64)

  def run(self, leaves, offsets=None, switches=None):
    self.offsets, self.switches, self.uses, self.decided = offsets, switches, [], []
    inputs = [Value(x, frozenset([i]), still=jax.lax.stop_gradient(x)) for i, x in enumerate(leaves)]
    inputs += [Value(x, batch=b and jnp.ndim(x) > 0) for x, b in zip(self.data, self.batched, strict=True)]
    return self.evaluate(self.jaxpr, self.closed.consts, inputs)

  def evaluate(self, jaxpr, consts, inputs):
    env = {}
    read = lambda v: Value(v.val) if isinstance(v, jex.Literal) else env[v]  # noqa: E731
    env.update(zip(jaxpr.constvars, map(Value, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
      values = [read(v) for v in eqn.invars]
      env.update(zip(eqn.outvars, self.operation(eqn, values), strict=True))
    return [read(v) for v in jaxpr.outvars]

  def inner(self, closed, values):
    return self.evaluate(getattr(closed, 'jaxpr', closed), getattr(closed, 'consts', ()), values)

  def operation(self, eqn, values):
    name, p = eqn.primitive.name, eqn.params
    if name in ('jit', 'pjit', 'checkpoint', 'remat2', 'closed_call'):
      return self.inner(p['jaxpr'], values)
    if name == 'custom_vjp_call' or (name == 'custom_jvp_call' and any(v.params and not v.batch for v in values)):
      return self.inner(p['call_jaxpr'], values)  # else it is bound again below, with its own slope where there are two
    if name == 'cond':
      self.decided.append(int(values[0].x) if self.decisions is None else self.decisions[len(self.decided)])
      return self.inner(p['branches'][self.decided[-1]], values[1:])
    if name == 'scan':
      return self.scan(eqn, values)
    xs = [v.x for v in values]
    if name == 'stop_gradient':
      return [Value(jax.lax.stop_gradient(xs[0]), batch=values[0].batch)]
    batch = any(v.batch for v in values)
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)
    params = frozenset().union(*(v.params for v in values)) if floating else frozenset()
    weights = [i for i, v in enumerate(values) if v.params and not v.batch]
    stills = [v.still for v in values]
    if len(weights) == 1 and batch and floating:
      (i,) = weights
      if name in LINEAR:
        xs = xs if self.switches is None else stills
        return [Value(self.linear(eqn, xs, i, values[i].params), batch=True)]
      if self.decide(eqn, xs[i]):
        return [Value(x, batch=True) for x in self.entrywise(eqn, xs, i, values[i])]
      if name in ('mul', 'div'):  # scaled by statistics of the batch: still a weight
        batch, params = False, values[i].params
    if batch or not params:
      return [Value(x, frozenset(), batch) for x in bind(eqn, xs)]
    constant = next((v.constant for v in values if v.constant is not None), None)
    if name == 'dot_general' and len(weights) == 1 and self.decisions is None:
      constant = np.asarray(xs[1 - weights[0]], np.float64).reshape(-1)
    return [Value(x, params, False, y, constant) for x, y in zip(bind(eqn, xs), bind(eqn, stills), strict=True)]

  def decide(self, eqn, w):
    """Whether examples tell apart here: the result has one row for each, and the parameter repeats along them."""
    if self.decisions is not None:
      self.decided.append(self.decisions[len(self.decided)])
      return self.decided[-1]
    shape = eqn.outvars[0].aval.shape
    rows = bool(shape) and shape[0] % self.n == 0
    self.decided.append(rows and (w.ndim == 0 or w.shape[0] == 1 or bool(np.all(np.asarray(w) == np.asarray(w)[:1]))))
    return self.decided[-1]

  def linear(self, eqn, xs, i, params):
    y = bind(eqn, xs)[0]
    k = len(self.uses)
    use = {'linear': True, 'eqn': eqn, 'position': i, 'x': xs, 'params': params, 'shape': y.shape, 'dtype': y.dtype}
    self.uses.append(use)
    return y if self.offsets is None else y + self.offsets[k].astype(y.dtype)

  def entrywise(self, eqn, xs, i, value):
    k, w, still = len(self.uses), value.x, value.still
    shape = eqn.outvars[0].aval.shape
    if w.ndim == 0 or w.shape[0] == 1 != shape[0]:
      w, still = jnp.broadcast_to(w, shape), jnp.broadcast_to(still, shape)
    self.uses.append({'linear': False, 'params': value.params, 'rows': w.shape[0], 'constant': value.constant})
    if self.switches is None:
      return bind(eqn, xs)
    s = self.switches[k].reshape(-1, *(1,) * (w.ndim - 1)).astype(w.dtype)
    return bind(eqn, [*xs[:i], still + s * (w - still), *xs[i + 1 :]])

  def scan(self, eqn, values):
    p = eqn.params
    body, consts = getattr(p['jaxpr'], 'jaxpr', p['jaxpr']), getattr(p['jaxpr'], 'consts', ())
    n_carry = sum(len(o.aval.shape) == len(b.aval.shape) for o, b in zip(eqn.outvars, body.outvars, strict=True))
    n_whole = sum(len(jnp.shape(v.x)) == len(b.aval.shape) for v, b in zip(values, body.invars, strict=True))
    fixed, carry, xs = values[: n_whole - n_carry], values[n_whole - n_carry : n_whole], values[n_whole:]
    for v, b in zip(carry, body.outvars[:n_carry], strict=True):  # a learned initial state
      assert not v.params or v.batch or b in body.invars, 'not covered by this reference'
      v.batch |= jnp.issubdtype(b.aval.dtype, jnp.inexact) and b not in body.invars  # zeros, too, are the batch's later
    rows = []
    for t in sorted(range(p['length']), reverse=p['reverse']):
      out = self.evaluate(body, consts, [*fixed, *carry, *(Value(v.x[t], v.params, v.batch, v.still[t]) for v in xs)])
      carry = out[:n_carry]
      rows.append(out[n_carry:])
    rows = rows[::-1] if p['reverse'] else rows

    def join(vs):
      params, batch = vs[0].params, any(v.batch for v in vs)
      return Value(jnp.stack([v.x for v in vs]), params, batch, jnp.stack([v.still for v in vs]))

    return [*carry, *(join(column) for column in zip(*rows, strict=True))]


def like(x):
  """Numbers none of which is zero in place of numbers; places in a table stay."""
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return x
  return normal(*x.shape, seed=3, dtype=x.dtype)


def bind(eqn, xs):
  out = eqn.primitive.bind(*xs, **eqn.primitive.get_bind_params(eqn.params))
  return list(out) if eqn.primitive.multiple_results else [out]


# --- a block's factors from its uses


def kronecker(reference, block, dy, each, active=False):
  """Sums over the uses of a block: {'A', 'G', "A'", "G'"} without the bias's row, and how many rows there are a slot.

  active: leave out rows whose dy is zero.
  """
  operator = block.operator
  order = [reference.names.index(name) for name in block.params[: len(operator.kernel.params)]]
  numbered = np.asarray(operator.kernel.apply(*(reference.ids[p] for p in order)))
  place = {int(n): position for position, n in np.ndenumerate(numbered)}
  slots, n_in, n_out = numbered.shape
  sums = {'A': np.zeros((slots, n_in, n_in)), 'G': np.zeros((slots, n_out, n_out))}
  sums |= {"A'": np.zeros((slots, n_out, n_out)), "G'": np.zeros((slots, n_in, n_in))}
  uses = {'A': 0, "A'": 0}
  for k, use in enumerate(reference.found):
    if not use['params'] & set(order):
      continue
    if not use['linear']:
      # The kernel met a constant c before: an example's gradient is c gT, or its transpose.
      c, (p,) = use['constant'], order
      v = np.stack([np.asarray(operator.kernel.apply(jnp.asarray(grad)))[0] for grad in each[k][p]]).astype(np.float64)
      transposed = len(c) != n_in
      g = np.einsum('i,bio->bo' if not transposed else 'o,bio->bi', c, v) / (c @ c)
      np.testing.assert_allclose(
        v, np.einsum('bo,i->bio' if not transposed else 'bi,o->bio', g, c), rtol=1e-3, atol=1e-6
      )
      a_name, g_name = ("A'", "G'") if transposed else ('A', 'G')
      sums[a_name][0] += len(g) * np.outer(c, c)
      sums[g_name][0] += g.T @ g
      uses[a_name] += len(g)
      continue
    w = use['x'][use['position']]
    numbers = use['ids'].reshape(-1)
    if 0 in numbers and w.shape == reference.leaves[order[0]].shape:  # pruned: all entries meet data, some are zero
      np.testing.assert_array_equal(np.asarray(w).reshape(-1)[numbers == 0], 0)
      numbers = np.asarray(reference.ids[order[0]]).reshape(-1)
    plainly = all(np.isfinite(n) and int(n) == n for n in numbers)
    if not plainly:  # a scaled kernel
      numbers = np.asarray(reference.ids[order[0]]).reshape(-1)
      scale = np.asarray(w / reference.leaves[order[0]], np.float64)
      assert w.shape == reference.leaves[order[0]].shape
      np.testing.assert_allclose(scale, np.broadcast_to(scale[(0,) * (w.ndim - 1)], w.shape), rtol=1e-4)
    else:
      scale = np.ones(w.shape)
    if not all(int(n) in place for n in numbers):
      continue  # another piece of the parameter
    s, i, o = np.array([place[int(n)] for n in numbers]).T
    whole = jnp.iscomplexobj(w)
    actual, probe = use['jacobians']
    entries = [np.flatnonzero(row) for row in probe]
    transposed = any(len(set(o[e])) > 1 for e in entries)
    along, across = (o, i) if transposed else (i, o)
    a_name, g_name = ("A'", "G'") if transposed else ('A', 'G')
    wide = np.complex128 if whole else np.float64
    g = np.asarray(dy[k], wide).reshape(-1)
    factor = scale.reshape(-1)
    if np.ptp(factor) <= 1e-3 * np.abs(factor).max():  # a scale of the whole kernel is counted with the rows
      actual, factor = actual * factor[0], np.ones_like(factor)
    rows: dict[tuple[int, int], list[int]] = {}
    for y, e in enumerate(entries):
      if len(e):
        rows.setdefault((s[e[0]], across[e[0]]), []).append(y)
    for slot in sorted({t for t, _ in rows}):  # one alone, in an iteration over stacked layers
      columns = sorted(c for t, c in rows if t == slot)
      if active:
        lives = [any(g[rows[slot, c][r]] for c in columns) for r in range(len(rows[slot, columns[0]]))]
        for c in columns:
          rows[slot, c] = [y for y, lives_on in zip(rows[slot, c], lives, strict=True) if lives_on]
      for r in range(len(rows[slot, columns[0]])):
        first = rows[slot, columns[0]][r]
        a = np.zeros(sums[a_name].shape[-1], wide)
        a[along[entries[first]]] = actual[first, entries[first]]
        gr = np.zeros(sums[g_name].shape[-1], wide)
        for c in columns:
          y = rows[slot, c][r]
          gr[c] = g[y] * factor[entries[y][0]]
        sums[a_name][slot] += np.outer(a, a.conj()).real
        sums[g_name][slot] += np.outer(gr, gr.conj()).real
    uses[a_name] += max((len(r) for (t, _), r in rows.items() if t == 0), default=0) * (2 if whole else 1)
  return sums, uses


def unit(reference, block, each):
  """Sum over uses and examples of the outer products of the block's gradients, channel by channel."""
  order = [reference.names.index(name) for name in block.params]
  by_use = {}
  for k, grads in each.items():
    for column, p in enumerate(order):
      if p in grads:
        by_use.setdefault(k, {})[column] = grads[p]
  size = block.operator.layouts[0].shape[0]
  total = np.zeros((size, len(order), len(order)))
  # The uses of scale and shift belong together in the order of the program.
  if block.operator.name == 'gain':
    by_use = {0: {0: reference.alone(order[0])}}
  queues = [[g[column] for g in by_use.values() if column in g] for column in range(len(order))]
  for group in itertools.zip_longest(*queues):
    columns = []
    for layout, grads in zip(block.operator.layouts, group, strict=True):
      columns.append(np.stack([np.asarray(layout.apply(jnp.asarray(g))).reshape(-1) for g in grads]))
    u = np.stack(columns, -1)
    total += np.einsum('bci,bcj->cij', u, u)
  return total


def diagonal_of(m):
  return np.diagonal(m, axis1=1, axis2=2)


def errors(curvature, fn, params, args, examples, state=()):
  """Relative errors of every statistic, of the empirical Fisher, against the reference, by (block, statistic)."""
  reference = Unrolled(fn, params, args, examples, state)
  dy, each = reference.gradients()
  _, _, stats = jax.jit(curvature.value_and_grad)(params, *args)
  ratio = float(stats.examples) / examples  # the mean is over the observations
  found = {}
  for block in curvature.blocks:
    sums = {k: np.asarray(v, np.float64) for k, v in stats.sums[block.name].items()}
    if 'F' in sums:
      found[block.name, 'F'] = relative(sums['F'], unit(reference, block, each) * ratio**2)
      continue
    expected, uses = kronecker(reference, block, dy, each)
    for name, m in sums.items():
      e = expected[name] * (ratio**2 if name.startswith('G') else 1)
      assert np.linalg.norm(e) > 0, f'{block.name}: no use was found'
      factor = block.operator.rows if name in ('A', "G'") else block.operator.columns
      if factor.n == 1 and factor.size > 1:
        m, e = m.reshape(factor.slots, factor.size), diagonal_of(e)
      elif block.operator.bias is not None and name in ('A', "G'"):
        m = m[:, :-1, :-1]
      found[block.name, name] = relative(m, e)
    for name, number in stats.uses[block.name].items():
      assert np.all(np.asarray(number) == uses[name]), (block.name, name, number, uses[name])
  return found


def relative(found, expected):
  assert found.shape == expected.shape, (found.shape, expected.shape)
  return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))


def check(curvature, fn, params, args, examples, state=(), tolerance=2e-4):
  """Compares every block's statistics with the reference; returns how many blocks there are."""
  found = errors(curvature, fn, params, args, examples, state)
  worst = max(found, key=found.get)
  assert found[worst] < tolerance, (worst, found[worst])
  assert {block for block, _ in found} == {block.name for block in curvature.blocks}
  return len(curvature.blocks)

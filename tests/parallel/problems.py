"""Small networks of every family, trained for some steps on any mesh: what the sharded run must equal."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from kronmesh import kron, models, parallel
from tests.draws import integers, normal


class Problem(NamedTuple):
  """A model with its rules and a batch."""

  model: nn.Module
  rules: str
  x: Any
  labels: Any


def problems(dtype, batch=16):
  """By name; sizes of which some divide by the meshes' axes and some do not."""
  image = lambda *shape: normal(batch, *shape, dtype=dtype)  # noqa: E731
  labels = integers(5, batch)
  d = {'dtype': dtype}
  return {
    'mlp': Problem(models.MLP((24, 16, 13), 5, **d), 'mlp', image(10), labels),
    'resnet': Problem(
      models.ResNet((1, 1), 5, 8, bottleneck=False, stem='small', **d), 'resnet', image(8, 8, 3), labels
    ),
    'convnet': Problem(models.ConvNet((8, 16), 5, **d), 'convnet', image(4, 8, 8, 2), labels),
    'r2plus1d': Problem(models.R2Plus1D((1, 1), 5, 6, stem='small', **d), 'r2plus1d', image(4, 6, 6, 2), labels),
    'video_transformer': Problem(
      models.VideoTransformer(5, (4, 4), layers=1, width=16, heads=4, causal=True, window=2, **d),
      'video_transformer',
      image(3, 8, 8, 2),
      labels,
    ),
    'transformer': Problem(
      models.Transformer(12, 6, layers=1, width=16, heads=4, **d),
      'transformer',
      integers(12, batch, 6),
      integers(12, batch, 6),
    ),
  }


class Compiled(NamedTuple):
  """A problem on a mesh.

  step: (state, batch) -> (state, loss, gradients, statistics' means), with a refresh; `plain` without one.
  """

  mesh: Any
  curvature: kron.Curvature
  placement: parallel.Placement
  state: Any
  shardings: Any
  batch: Any
  step: Any
  plain: Any


def compiled(problem, mesh, dtype=jnp.float32, placement=None, **options) -> Compiled:
  """The problem on a mesh, with K-FAC at damping 1e-2; nothing has run."""
  placement = (placement or parallel.Placement(mesh)).check()
  rules = parallel.RULES[problem.rules]
  init = jax.eval_shape(lambda: problem.model.init(jax.random.key(0), problem.x, train=False))
  logical = nn.get_partition_spec(init)['params']

  def variables():
    """Drawn by numpy: the same on every mesh, and of the type asked for."""
    shapes = nn.meta.unbox(init)
    leaves, treedef = jax.tree.flatten(shapes)
    drawn = [
      (
        1.0 + 0.1 * normal(*s.shape, seed=i)
        if s.ndim < 2
        else normal(*s.shape, seed=i) / np.sqrt(np.prod(s.shape[:-1]))
      )
      for i, s in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, [x.astype(dtype) for x in drawn])

  strips = parallel.image_strips(mesh, problem.x.shape)
  padded = parallel.cut(np.asarray(problem.x), {dim: strip.places for dim, strip in strips.items()})

  def loss_fn(params, state, x, labels):
    with parallel.logical_axes(rules, mesh):
      out = problem.model.apply({'params': params, **state}, x, train=True, mutable=list(state))
    logits = kron.observe.categorical(out[0].astype(dtype), labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), out[1]

  all_variables = variables()
  params, state = all_variables.pop('params'), all_variables
  of_params = parallel.param_shardings(params, logical, rules, mesh)
  layers = parallel.layer_strips(of_params, params, mesh)
  if strips or layers is not None:
    loss_fn = parallel.partition(loss_fn, mesh, (layers, None, strips or None, None))
  batch = (padded, problem.labels)
  curvature = kron.curvature(
    loss_fn, params, state, *batch, fisher='empirical', has_aux=True, placement=placement, **options
  )
  tx = kron.kfac(0.1, curvature, damping=1e-2, placement=placement)
  opt_state = jax.eval_shape(tx.init, params)
  replicated = NamedSharding(mesh, PartitionSpec())
  shardings = (
    of_params,
    jax.tree.map(lambda _: replicated, state),
    parallel.state_shardings(opt_state, of_params, mesh, placement),
  )
  data = of_batch(mesh, batch)

  def make_step(phase):
    def step(carry, batch):
      params, state, opt_state = carry
      (loss, state), grads, stats = curvature.value_and_grad(params, state, *batch, statistics=phase == 'refresh')
      grads = jax.lax.with_sharding_constraint(grads, of_params)
      updates, opt_state = tx.update(grads, opt_state, params, stats=stats, phase=phase)
      return (optax.apply_updates(params, updates), state, opt_state), loss, grads

    return jax.jit(step, in_shardings=(shardings, data), out_shardings=(shardings, replicated, of_params))

  def begin():
    return params, state, tx.init(params)

  return Compiled(mesh, curvature, placement, begin, shardings, batch, make_step('refresh'), make_step('plain'))


def arguments(c: Compiled):
  """Shapes and shardings of a step's arguments."""
  carry = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(c.state), c.shardings
  )
  like = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
  return carry, jax.tree.map(like, c.batch, of_batch(c.mesh, c.batch))


def of_batch(mesh, batch):
  """Shardings of images and labels."""
  x, labels = batch
  strips = parallel.image_strips(mesh, x.shape)
  return parallel.image_sharding(mesh, len(x), strips, x.ndim), parallel.batch_sharding(mesh, len(labels))


def placed(c: Compiled):
  """The first state and the batch, on the mesh."""
  put = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: np.asarray(x)[i])  # noqa: E731
  carry = jax.jit(c.state, out_shardings=c.shardings)()
  return carry, jax.tree.map(put, c.batch, of_batch(c.mesh, c.batch))


def five_steps(c: Compiled, steps=5) -> dict[str, np.ndarray]:
  """Losses, the first step's gradients, and parameters and factors after the last, as numpy arrays on every process."""
  carry, batch = placed(c)
  losses, first = [], None
  for _ in range(steps):
    carry, loss, grads = c.step(carry, batch)
    losses.append(loss)
    first = grads if first is None else first
  whole = NamedSharding(c.mesh, PartitionSpec())
  read = jax.jit(lambda s: kron.factors(s), out_shardings=whole)
  found = {'losses': losses, 'gradients': first, 'parameters': carry[0], 'factors': read(carry[2])}
  found = jax.device_get(jax.jit(lambda x: x, out_shardings=whole)(found))
  return {k: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(v)]) for k, v in found.items()}


def apart(found, expected) -> dict[str, float]:
  """Norm-relative errors."""
  return {k: float(np.linalg.norm(found[k] - v) / np.linalg.norm(v)) for k, v in expected.items()}

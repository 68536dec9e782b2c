"""Parts of training beside the optimiser: schedules, weight rescaling, mixup, averages, microbatches, loss scales.

Those for large batches come from SP-NGD (Osawa et al. 2020, arXiv:2002.06015, sections 5 and 6). Each is an option of
the config.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray, PyTree

from .. import kron
from .errors import ConfigError

SCALINGS = {'none': lambda ratio: 1.0, 'linear': lambda ratio: ratio, 'sqrt': math.sqrt}
SCHEDULES = ('constant', 'cosine', 'polynomial')
_MIXING = 0x6D6978  # folded into a step's key


def check(config: Any) -> None:
  """Raises ConfigError for options that do not work together, or not with this optimiser."""
  own, optimizer = config.recipe, config.optimizer
  if own.mixup and own.cutmix:
    raise ConfigError('config.recipe has mixup and cutmix; set one to 0')
  if optimizer in ('adaptive_kfac', 'natural_gradient'):  # these evaluate the loss themselves, on the whole batch
    for name, value, none in (('microbatches', config.microbatches, 1), ('recipe.loss_scale', own.loss_scale, 0)):
      if value != none:
        raise ConfigError(f'config.{name}={value:g} does not go with config.optimizer={optimizer!r}; set it to {none}')


def learning_rate(own: Any, config: Any) -> optax.Schedule:
  """Returns a section's schedule: a linear warm-up, then constant, cosine or polynomial; scaled by the batch.

  Raises:
    ConfigError: a name is unknown, or the warm-up is as long as the run.
  """
  if own.warmup_steps >= config.steps:
    raise ConfigError(f'{config.optimizer}.warmup_steps={own.warmup_steps} leaves nothing of steps={config.steps}')
  if config.recipe.rate_scaling not in SCALINGS:
    raise ConfigError(
      f'recipe.rate_scaling={config.recipe.rate_scaling!r} is unknown; choose from {", ".join(SCALINGS)}'
    )
  peak_rate = peak(own, config)
  left = config.steps - own.warmup_steps
  if own.schedule == 'constant':
    after = optax.constant_schedule(peak_rate)
  elif own.schedule == 'cosine':
    after = optax.cosine_decay_schedule(peak_rate, left, alpha=0.01)
  elif own.schedule == 'polynomial':
    after = optax.polynomial_schedule(peak_rate, 0.01 * peak_rate, own.power, left)
  else:
    raise ConfigError(f'{config.optimizer}.schedule={own.schedule!r} is unknown; choose from {", ".join(SCHEDULES)}')
  if not own.warmup_steps:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, peak_rate, own.warmup_steps), after], [own.warmup_steps])


def peak(own: Any, config: Any) -> float:
  """Returns the largest learning rate: the rate of the section, scaled by the batch."""
  return own.learning_rate * SCALINGS[config.recipe.rate_scaling](
    config.data.batch_size / config.recipe.reference_batch
  )


def momentum(own: Any, rate: optax.Schedule, peak: float) -> optax.ScalarOrSchedule:
  """Returns the momentum: constant, or with `momentum_follows_rate` in proportion to the learning rate (eq. 19)."""
  if not own.get('momentum_follows_rate'):
    return own.momentum
  return lambda count: own.momentum * rate(count) / peak


def mean(values: Num[Array, ' b'], batch: dict[str, Array]) -> Float[Array, '']:
  """Returns the mean over the examples of the batch; those that fill up a last batch have mask 0 and do not count."""
  if 'mask' not in batch:
    return values.mean()
  return (values * batch['mask']).sum() / batch['mask'].sum()


def counted(batch: dict[str, Array]) -> Bool[Array, ' b'] | None:
  """Returns which examples of the batch count, as a mask for the marked outputs; None if all do."""
  return batch['mask'] > 0 if 'mask' in batch else None


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
  """Raises ConfigError for a pattern of `rescale_weights` that matches no parameter."""
  for pattern in patterns:
    if not any(fnmatch.fnmatch(name, str(pattern)) for name in names):
      raise ConfigError(f'recipe.rescale_weights={pattern!r} fits no parameter; there are {", ".join(names[:6])} ...')


def rescale_weights(patterns: Sequence[str]) -> optax.GradientTransformation:
  """Makes the last link of a chain, which keeps the norm of matching parameters at sqrt(2 d_out) (eq. 21).

  It rescales them after every step. Use it for kernels whose scale is cancelled by a norm behind them; d_out is the
  length of their last axis.
  """

  def update(updates, state, params=None):
    names = kron.param_names(params)

    def one(name: str, u: Array, p: Array) -> Array:
      if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
        return u
      new = p + u
      return new * (math.sqrt(2 * p.shape[-1]) / (jnp.linalg.norm(new.reshape(-1)) + 1e-9)) - p

    treedef = jax.tree.structure(updates)
    leaves = [one(*x) for x in zip(names, jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)]
    return treedef.unflatten(leaves), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def soft_labels(batch: dict[str, Array], classes: int, smoothing: float) -> Float[Array, 'b classes']:
  """Returns the batch's targets, mixed or one-hot, with the share `smoothing` spread over all classes."""
  target = batch['target'] if 'target' in batch else jax.nn.one_hot(batch['label'], classes)
  return (1 - smoothing) * target + smoothing / classes


def mix(
  batch: dict[str, Array],
  previous: PyTree,
  key: PRNGKeyArray,
  *,
  alpha: float,
  cut: float,
  running: bool,
  classes: int,
) -> tuple[dict[str, Array], PyTree]:
  """Mixes the images and targets of a batch by mixup or by cutmix.

  Mixup takes weighted means of two examples, with the weight drawn from Beta(alpha, alpha). Cutmix over time takes a
  run of frames from another clip and weights the targets by the number of frames (VideoMix, Yun et al. 2020, section
  3.2).

  Args:
    batch: 'inputs' and 'label'.
    previous: the second result of the last call, or zeros of that shape before the first.
    alpha: the parameter of mixup, 0 for no mixup.
    cut: the alpha of cutmix, 0 for no cutmix; images are then clips, (b, t, h, w, c).
    running: whether the partner is the last *mixed* batch (running mixup, eq. 18) and not another example of this one.

  Returns:
    The batch with 'target', (b, classes), and what the next call needs.
  """
  if not (alpha or cut):
    return batch, previous
  key = jax.random.fold_in(key, _MIXING)
  weight = jax.random.beta(key, alpha or cut, alpha or cut)
  own = {'inputs': batch['inputs'], 'target': jax.nn.one_hot(batch['label'], classes)}
  if cut:
    order = jax.random.permutation(jax.random.fold_in(key, 1), len(batch['label']))
    time = jnp.arange(batch['inputs'].shape[1])
    length = jnp.round((1 - weight) * time.size)
    start = jnp.floor(jax.random.uniform(jax.random.fold_in(key, 2)) * (time.size - length + 1))
    other = ((time >= start) & (time < start + length))[:, None, None, None]
    image = jnp.where(other, own['inputs'][order], own['inputs'])
    share = length / time.size
    return {**batch, 'inputs': image, 'target': (1 - share) * own['target'] + share * own['target'][order]}, previous
  if running:
    weight = jnp.where(previous['target'].sum() > 0, jnp.maximum(weight, 1 - weight), 1.0)
    partner = previous
  else:
    order = jax.random.permutation(jax.random.fold_in(key, 1), len(batch['label']))
    partner = jax.tree.map(lambda x: x[order], own)
  mixed = jax.tree.map(lambda a, b: weight * a + (1 - weight) * b, own, partner)
  return {**batch, **mixed}, mixed if running else previous


def nothing_mixed(config: Any, image: jax.ShapeDtypeStruct) -> PyTree:
  """Returns what `mix` takes as `previous` before the first step: nothing, or an empty running batch."""
  if not (config.recipe.mixup and config.recipe.running_mixup):
    return ()
  return {'inputs': jnp.zeros(image.shape, image.dtype), 'target': jnp.zeros((image.shape[0], config.model.classes))}


def clipped(tx: optax.GradientTransformation, norm: float) -> optax.GradientTransformationExtraArgs:
  """Returns a transformation that first clips the norm over all gradients to `norm`; 0 does not clip."""
  return optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(norm), tx) if norm else tx)


def averaged(average: PyTree, params: PyTree, step: Array, decay: float) -> PyTree:
  """Returns the new moving average, whose decay is at most (1 + t) / (10 + t), to follow the parameters early on."""
  return optax.incremental_update(params, average, 1 - jnp.minimum(decay, (1 + step) / (10 + step)))


def microbatches(batch: dict[str, Array], count: int, shardings: dict[str, jax.sharding.NamedSharding]) -> PyTree:
  """Divides the batch into `count` microbatches, (count, b / count, ...), with equally many examples of every shard.

  shardings: the shardings of the arrays, by name; any other array has that of 'label'.
  """

  def divide(x: Array, sharding: jax.sharding.NamedSharding) -> Array:
    axes, *rest = sharding.spec or (None,)
    shards = math.prod(sharding.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
    parts = jnp.swapaxes(x.reshape(shards, count, -1, *x.shape[1:]), 0, 1).reshape(count, -1, *x.shape[1:])
    where = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, axes, *rest))
    return jax.lax.with_sharding_constraint(parts, where)

  return {name: divide(x, shardings.get(name, shardings['label'])) for name, x in batch.items()}


def added_up(one: Callable, model_state: PyTree, parts: PyTree, count: int) -> tuple[PyTree, tuple]:
  """Runs `one` on all microbatches, averaging the metrics and gradients and summing the statistics.

  one: takes (model state, (number, microbatch)).
  """
  numbered = (jnp.arange(count), parts)
  shapes = jax.eval_shape(one, model_state, jax.tree.map(lambda x: x[0], numbered))[1]

  def body(carry, part):
    model_state, sums = carry
    model_state, own = one(model_state, part)
    return (model_state, jax.tree.map(jnp.add, sums, own)), None

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (model_state, (metrics, grads, stats)), _ = jax.lax.scan(body, (model_state, zeros), numbered)
  return model_state, (*jax.tree.map(lambda x: x / count, (metrics, grads)), stats)


def scaled(config: Any, loss: Callable) -> Callable:
  """Returns the loss, multiplied by the scale that is passed beside the model's state if the config has one."""
  if not config.recipe.loss_scale:
    return loss

  def times(params, carried, batch, train=True):
    model_state, scale = carried
    value, aux = loss(params, model_state, batch, train)
    return value.astype(jnp.float32) * scale, aux

  return times


def carried(config: Any, model_state: PyTree, scale: Any = None) -> PyTree:
  """Returns what a scaled loss takes as the model's state."""
  if not config.recipe.loss_scale:
    return model_state
  return model_state, jax.ShapeDtypeStruct((), jnp.float32) if scale is None else scale


def unscaled(
  grads: PyTree, extra: dict[str, Any], scale: Float[Array, ''], curvature: kron.Curvature | None
) -> tuple[PyTree, dict[str, Any]]:
  """Returns gradients and statistics without the loss scale; statistics of drawn targets do not come from the loss."""
  grads = jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)
  if extra.get('stats') is not None and curvature.fisher == 'empirical':
    extra = {**extra, 'stats': extra['stats'].of_loss_times(1 / scale)}
  return grads, extra

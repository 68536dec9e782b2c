"""Optimisers by name, built from the config's section of that name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from .. import kron
from ..parallel import Placement
from . import recipe, schedules
from .errors import ConfigError
from .players import Player

# Optimisers that no package can run here. `kronmesh compare` lists them, as it does `PEERS` that do not run.
MISSING = {
  'shampoo': 'optax-shampoo 0.0.6, the only package on PyPI, calls jax.tree_map, which jax >= 0.4.26 lacks',
  'soap': 'no package on PyPI has it for JAX',
}


def _kfac(section: Any, rate: Any, momentum: Any, curvature: kron.Curvature, placement: Placement) -> Any:
  # The inverse schedule renews its factors and inverses, see `make_inverse_schedule`.
  return kron.kfac(rate, curvature, placement=placement, **_descent(section, momentum))


def _kfac_inside(section: Any, rate: Any, momentum: Any, curvature: kron.Curvature, placement: Placement) -> Any:
  settings = {'damping': section.damping, 'decay': section.decay}
  return kron.kfac(rate, curvature, placement=placement, **settings, **_descent(section, momentum))


def _stale_kfac(section: Any, rate: Any, momentum: Any, curvature: kron.Curvature, placement: Placement) -> Any:
  settings = {name: section[name] for name in ('damping', 'decay', 'threshold', 'smallest', 'largest')}
  return kron.stale_kfac(rate, curvature, placement=placement, **settings, **_descent(section, momentum))


def _adaptive_kfac(section: Any, rate: Any, momentum: Any, curvature: kron.Curvature, placement: Placement) -> Any:
  del momentum
  settings = {name: section[name] for name in ('damping', 'damping_every', 'damping_rate', 'smallest_damping', 'decay')}
  return kron.adaptive_kfac(curvature, scale=rate, kl_clip=section.kl_clip or None, placement=placement, **settings)


def _ekfac(section: Any, rate: Any, momentum: Any, curvature: kron.Curvature, placement: Placement) -> Any:
  return kron.ekfac(
    rate, curvature, damping=section.damping, decay=section.decay, placement=placement, **_descent(section, momentum)
  )


def _kfac_adam(section: Any, rate: Any, momentum: Any, curvature: kron.Curvature, placement: Placement) -> Any:
  del momentum
  settings = {name: section[name] for name in ('b1', 'b2', 'decay', 'weight_decay')}
  return kron.kfac_adam(rate, curvature, placement=placement, **settings)


def _natural_gradient(section: Any, rate: Any, momentum: Any, curvature: kron.Curvature, placement: Placement) -> Any:
  del momentum
  inner = kron.scale_by_kfac(curvature, damping=section.damping, decay=section.decay, placement=placement)
  settings = {name: section[name] for name in ('damping', 'max_iterations', 'tolerance')}
  return kron.natural_gradient(rate, preconditioner=inner, **settings)


def _descent(section: Any, momentum: Any) -> dict[str, Any]:
  return {'momentum': momentum, 'kl_clip': section.kl_clip or None, 'weight_decay': section.weight_decay}


# (section, learning rate, momentum) -> transformation
FIRST_ORDER: dict[str, Callable] = {
  'sgd': lambda section, rate, momentum: optax.chain(
    optax.add_decayed_weights(section.weight_decay),
    optax.inject_hyperparams(optax.trace)(decay=momentum) if callable(momentum) else optax.trace(decay=momentum),
    optax.scale_by_learning_rate(rate),
  ),
  'adam': lambda section, rate, momentum: optax.adamw(
    rate, b1=section.b1, b2=section.b2, weight_decay=section.weight_decay
  ),
  'lars': lambda section, rate, momentum: optax.lars(
    rate, weight_decay=section.weight_decay, momentum=section.momentum
  ),
  'lamb': lambda section, rate, momentum: optax.lamb(
    rate, b1=section.b1, b2=section.b2, weight_decay=section.weight_decay
  ),
  'muon': lambda section, rate, momentum: optax.contrib.muon(
    rate, beta=section.momentum, weight_decay=section.weight_decay
  ),
}
SECOND_ORDER: dict[str, Callable] = {
  'kfac': _kfac,
  'stale_kfac': _stale_kfac,
  'adaptive_kfac': _adaptive_kfac,
  'ekfac': _ekfac,
  'kfac_adam': _kfac_adam,
  'natural_gradient': _natural_gradient,
}
OPTIMIZERS = (*SECOND_ORDER, *FIRST_ORDER)
PEERS = ('kfac_jax',)  # training steps of other packages, see kfac_jax_peer.py; only comparisons name them


def make_optimizer(
  config: Any, curvature: kron.Curvature | None, placement: Placement, inside: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Makes the optimiser `config.optimizer`; only those of `SECOND_ORDER` need `curvature`.

  inside: whether K-FAC renews its factors and inverses itself, because there is no inverse schedule.

  Raises:
    ConfigError: the name is unknown, or the schedule is unknown or longer than the run.
  """
  name = config.optimizer
  if name in MISSING:
    raise ConfigError(f'config.optimizer={name!r} cannot run: {MISSING[name]}')
  if name not in OPTIMIZERS:
    raise ConfigError(f'config.optimizer={name!r} is unknown; choose from {", ".join(OPTIMIZERS)}')
  section = config[name]
  rate = schedules.learning_rate(section, config)
  momentum = schedules.momentum(section, rate, schedules.peak(section, config)) if 'momentum' in section else None
  if name in FIRST_ORDER:
    tx = FIRST_ORDER[name](section, rate, momentum)
  else:
    make = _kfac_inside if inside and name == 'kfac' else SECOND_ORDER[name]
    tx = make(section, rate, momentum, curvature, placement)
  patterns = config.recipe.rescale_weights
  tx = optax.chain(tx, recipe.rescale_weights(patterns)) if patterns else tx
  return recipe.clipped(tx, config.recipe.clip_norm)


def make_inverse_schedule(
  config: Any, curvature: kron.Curvature | None, placement: Placement
) -> kron.InverseSchedule | None:
  """Makes the schedule by which K-FAC renews factors and inverses; None for other optimisers."""
  if config.optimizer != 'kfac':
    return None
  names = ('damping', 'decay', 'statistics_every', 'inverses_every')
  return kron.inverse_schedule(curvature, placement=placement, **{name: config.kfac[name] for name in names})


def gradients(
  player: Player, args: tuple, opt_state: Any, key: Any, statistics: bool, refresh: bool, around: Callable
) -> tuple[tuple[Any, Any], Any, dict[str, Any]]:
  """Computes a player's gradient for an optimiser of `SECOND_ORDER`.

  Args:
    args: (params, context, batch), as the player's loss takes them.
    statistics, refresh: whether this step takes statistics and refreshes inverses; see `steps.phase`.
    around: wraps the gradient, see `gradient_allreduce.by_shard`.

  Returns:
    ((loss, aux), gradients, what else the optimiser's update takes).
  """
  name, curvature, basis, due = player.config.optimizer, player.curvature, None, statistics
  if name == 'stale_kfac' and statistics:
    due = kron.due(opt_state, curvature)
  if name == 'ekfac':
    basis = kron.basis(opt_state, curvature)

  def gradient(params, context, batch, key):
    return curvature.value_and_grad(params, context, batch, key=key, statistics=due, basis=basis)

  (value, aux), grads, stats = around(gradient)(*args, key)
  extra = {'stats': stats, 'phase': 'refresh' if refresh else 'plain'}
  if name == 'natural_gradient':
    extra['products'] = curvature.products(*args, key=key, fisher='exact')
  if name == 'adaptive_kfac':
    extra |= {'value': value, 'value_fn': lambda params: player.loss(params, *args[1:])[0]}
    extra['products'] = lambda: curvature.products(*args, key=key, fisher='exact')
  return (value, aux), grads, extra

"""The zeros of a trained ternary network, chosen by the curvature of its loss or by the size of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from .. import kron
from ..edge import choice
from ..models.ternary import MOMENTUM
from ..train.beginning import new_state
from ..train.build import build
from ..train.checkpoints import export, load_export
from ..train.errors import ConfigError
from ..train.loop import evaluate_all
from ..train.run import Run
from ..train.steps import TrainState
from .deployed import on_all_devices

WAYS = ('curvature', 'magnitude')
DAMPING = 0.01  # of the factors, as a share of their mean diagonals
Key = tuple[str, int]  # a layer, and a slot of its factors


class Pruned(NamedTuple):
  """What was chosen. zeros, cost: of each layer, the share of zeros and the growth of the loss that the curvature expects.

  before, after: the scores of the evaluation.
  """

  zeros: dict[str, float]
  cost: dict[str, float]
  before: dict[str, float]
  after: dict[str, float]


def prune(folder: str | Path, workdir: str | Path, zeros: float, by: str = 'curvature', batches: int = 20) -> Pruned:
  """Chooses the weights of a finished run's TernaryNet that become zero, and exports the result.

  The first layer and the head have their own shares of zeros (`first_zeros`, `head_zeros`); all others share one budget.
  Afterwards the batch norms' averages are taken anew from `batches` batches. Another run goes on from the result with
  config.start and config.model.rule=chosen.

  Args:
    folder: the work folder of the run.
    workdir: the folder for the export.
    zeros: the share of zeros of all layers between the first and the head.
    by: 'curvature' or 'magnitude'; the latter gives all layers the same share.
    batches: of training, for the curvature and the batch norms.

  Raises:
    ConfigError: the run has no export, or its model is another one; `by` is unknown; `workdir` holds a run.
  """
  if by not in WAYS:
    raise ConfigError(f'--by={by!r} is unknown; choose from {", ".join(WAYS)}')
  workdir = Path(workdir)
  if (workdir / 'config.json').exists():
    raise ConfigError(f'{workdir} holds a run, whose export would be replaced; choose another --workdir')
  config = ConfigDict(load_export(folder)[1]['config'])
  if config.model.name != 'ternary':
    raise ConfigError(f'{folder} is a run of config.model.name={config.model.name!r}; only a ternary network is pruned')
  config = on_all_devices(config)
  config.start, config.optimizer, config.kfac.subsample = str(folder), 'kfac', 1.0
  # Targets that a confident network draws are nearly always the same and have no gradient, so none are drawn.
  config.kfac.fisher = 'exact'
  run = build(config)
  state = new_state(run)
  layers = layers_of(run, state, batches)
  chosen = chosen_of(layers, run.task.model, zeros, by)
  config = config.copy_and_resolve_references()
  config.model.rule = 'chosen'
  after = build(config)
  pruned = _normed(after, _put(new_state(after), chosen, run), batches)
  result = evaluate_all(after, pruned)
  export(after, workdir, pruned, result)
  names = sorted({name for name, _ in chosen})
  kept = {n: np.mean([np.mean(c.signs != 0) for (name, _), c in chosen.items() if name == n]) for n in names}
  costs = {n: sum(choice.cost(layers[key], c) for key, c in chosen.items() if key[0] == n) for n in names}
  return Pruned({n: 1 - float(share) for n, share in kept.items()}, costs, evaluate_all(run, state), result)


def layers_of(run: Run, state: TrainState, batches: int) -> dict[Key, choice.Layer]:
  """Returns the weights of a network's layers, with factors from `batches` batches of training.

  Raises:
    ConfigError: K-FAC has no factors A and G for a layer.
  """
  (curvature,) = run.curvatures.values()
  take = jax.jit(lambda batch, key: curvature.value_and_grad(state.params, state.model_state, batch, key=key)[2])
  stats = [
    take(batch, jax.random.key(i))
    for i, batch in zip(range(batches), run.train_batches(run.config.seed, 0), strict=False)
  ]
  sums, layers = kron.accumulate(*stats), {}
  for name, block in _kernels(run).items():
    leaves = [_leaf(state.params, param) for param in block.params]
    weights = np.asarray(block.operator.to_matrix(*leaves), np.float64)
    means = {k: np.asarray(v, np.float64) for k, v in sums.means(block.name).items()}
    rows = weights.shape[1] - (len(block.params) > 1)  # the bias of a head is the last row, and no weight
    for slot, weight in enumerate(weights):
      a, g = _damped(means['A'][slot][:rows, :rows]), _damped(means['G'][slot])
      layers[name, slot] = choice.Layer(weight[:rows], a, g, one_scale=name == 'head')
  return layers


def _kernels(run: Run) -> dict[str, Any]:
  """Returns the blocks of the kernels of all layers, by the layer's name. A depthwise layer has a slot for each channel."""
  (curvature,) = run.curvatures.values()
  blocks = {b.name.removesuffix('/kernel'): b for b in curvature.blocks if 'A' in b.operator.factors}
  for name in curvature.parameters.names:
    layer, _, leaf = name.rpartition('/')
    if leaf == 'kernel' and layer not in blocks:
      raise ConfigError(f'K-FAC has no factors A and G for {name!r}, so its zeros cannot be chosen; use --by=magnitude')
  return blocks


def _damped(factor: np.ndarray) -> np.ndarray:
  return factor + DAMPING * np.trace(factor) / len(factor) * np.eye(len(factor))


def chosen_of(layers: dict[Key, choice.Layer], model: Any, zeros: float, by: str) -> dict[Key, choice.Chosen]:
  """Chooses the weights: the first layer and the head to their own shares of zeros, the others under one budget."""
  own = {'layer_0': model.first_zeros, 'head': model.head_zeros}
  chosen: dict[Key, choice.Chosen] = {}
  for share in ('layer_0', 'head', None):
    group = {key: layer for key, layer in layers.items() if (key[0] if key[0] in own else None) == share}
    left = {key: round((1 - own.get(share, zeros)) * layer.weight.size) for key, layer in group.items()}
    if by == 'magnitude':
      chosen |= {key: choice.by_magnitude(layer.weight, left[key]) for key, layer in group.items()}
    elif group:
      chosen |= choice.under_budget(group, sum(left.values()))
  return chosen


def _put(state: TrainState, chosen: dict[Key, choice.Chosen], run: Run) -> TrainState:
  """Returns the state whose kernels are the chosen weights, with the masks of those that are not zero."""
  params, masks = jax.tree.map(lambda x: x, state.params), dict(state.model_state['edge'])
  for name, block in _kernels(run).items():
    slots = [chosen[key] for key in chosen if key[0] == name]
    shape = params[name]['kernel'].shape
    signs = _as_kernel(block, np.stack([c.signs for c in slots]), shape)
    params[name]['kernel'] = jnp.asarray(_as_kernel(block, np.stack([c.signs * c.scale for c in slots]), shape))
    masks[name] = {'kept': jnp.asarray(signs != 0)}
  return state._replace(params=params, model_state={**state.model_state, 'edge': masks})


def _as_kernel(block: Any, matrices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  if len(block.params) > 1:  # the bias of a head is the last row
    matrices = np.concatenate([matrices, np.zeros_like(matrices[:, :1])], 1)
  return np.asarray(block.operator.from_matrix(jnp.asarray(matrices, jnp.float32))[0]).reshape(shape)


def _leaf(params: Any, name: str) -> jax.Array:
  for key in name.split('/'):
    params = params[key]
  return params


def _normed(run: Run, state: TrainState, batches: int) -> TrainState:
  """Returns the state with the batch norms' averages over `batches` batches, with equal weights."""
  model = run.task.model

  @jax.jit
  def moments(batch):
    zero = {**state.model_state, 'batch_stats': jax.tree.map(jnp.zeros_like, state.model_state['batch_stats'])}
    _, new = model.apply({'params': state.params, **zero}, batch['inputs'], train=True, mutable=list(zero))
    return jax.tree.map(lambda x: x / (1 - MOMENTUM) / batches, new['batch_stats'])

  each = [moments(batch) for _, batch in zip(range(batches), run.train_batches(run.config.seed, 0), strict=False)]
  stats = jax.tree.map(lambda *parts: sum(parts), *each)
  return state._replace(model_state={**state.model_state, 'batch_stats': stats})

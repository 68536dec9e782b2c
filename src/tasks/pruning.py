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
from ..train.build import build
from ..train.checkpoints import export, load_export
from ..train.errors import ConfigError
from ..train.loop import evaluate_all
from ..train.run import Run
from ..train.steps import TrainState
from .deployed import on_all_devices

WAYS = ('curvature', 'magnitude')
DAMPING = 0.01  # of the factors, as a share of their mean diagonals
MOMENTUM = 0.9  # of the batch norms' averages in `models.TernaryNet`


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
  folder, workdir = Path(folder), Path(workdir)
  if (workdir / 'config.json').exists():
    raise ConfigError(f'{workdir} holds a run, whose export would be replaced; choose another --workdir')
  variables, about = load_export(folder / 'export' if (folder / 'export').is_dir() else folder)
  config = ConfigDict(about['config'])
  if config.model.name != 'ternary':
    raise ConfigError(f'{folder} is a run of config.model.name={config.model.name!r}; only a ternary network is pruned')
  config = on_all_devices(config)
  config.optimizer = 'kfac'
  config.kfac.subsample = 1.0
  config.kfac.fisher = (
    'exact'  # targets that a confident network draws are nearly always the same, and have no gradient
  )
  run = build(config)
  state = _with(run, jax.tree.map(jnp.asarray, variables))
  layers = layers_of(run, state, batches)
  chosen = chosen_of(layers, run.task.model, zeros, by)
  config = config.copy_and_resolve_references()
  config.model.rule = 'chosen'
  after = build(config)
  pruned = _normed(after, _with(after, _put(variables, chosen, run)), batches)
  result = evaluate_all(after, pruned)
  export(after, workdir, pruned, result)
  shares = {name: 1 - np.count_nonzero(c.signs) / c.signs.size for name, c in chosen.items()}
  costs = {name: choice.cost(layers[name], c) for name, c in chosen.items()}
  return Pruned(shares, costs, evaluate_all(run, state), result)


def layers_of(run: Run, state: TrainState, batches: int) -> dict[str, choice.Layer]:
  """Returns the weights of a network's layers, with factors from `batches` batches of training."""
  (curvature,) = run.curvatures.values()
  take = jax.jit(lambda batch, key: curvature.value_and_grad(state.params, state.model_state, batch, key=key)[2])
  sums = None
  for i, batch in zip(range(batches), run.train_batches(run.config.seed, 0), strict=False):
    stats = take(batch, jax.random.key(i))
    sums = stats if sums is None else kron.accumulate(sums, stats)
  layers = {}
  for block in curvature.blocks:
    if not block.name.endswith('kernel') or 'A' not in block.operator.factors:
      continue
    leaves = [_leaf(state.params, name) for name in block.params]
    weight = np.asarray(block.operator.to_matrix(*leaves)[0], np.float64)
    means = {k: np.asarray(v[0], np.float64) for k, v in sums.means(block.name).items()}
    rows = len(weight) - (len(block.params) > 1)  # the bias of a head is the last row, and no weight
    a = means['A'][:rows, :rows]
    a += DAMPING * np.trace(a) / rows * np.eye(rows)
    g = means['G'] + DAMPING * np.trace(means['G']) / len(means['G']) * np.eye(len(means['G']))
    name = block.name.removesuffix('/kernel')
    layers[name] = choice.Layer(weight[:rows], a, g, one_scale=name == 'head')
  return layers


def chosen_of(layers: dict[str, choice.Layer], model: Any, zeros: float, by: str) -> dict[str, choice.Chosen]:
  """Chooses the weights: the first layer and the head to their own shares of zeros, the others under one budget."""
  own = {'layer_0': model.first_zeros, 'head': model.head_zeros}
  groups = [({name: layers[name]}, share) for name, share in own.items() if name in layers]
  groups.append(({name: layer for name, layer in layers.items() if name not in own}, zeros))
  chosen: dict[str, choice.Chosen] = {}
  for group, share in groups:
    left = lambda layer, share=share: round((1 - share) * layer.weight.size)  # noqa: E731
    if by == 'magnitude':
      chosen |= {name: choice.by_magnitude(layer.weight, left(layer)) for name, layer in group.items()}
    elif group:
      chosen |= choice.under_budget(group, sum(map(left, group.values())))
  return chosen


def _put(variables: dict[str, Any], chosen: dict[str, choice.Chosen], run: Run) -> dict[str, Any]:
  """Returns variables whose kernels are the chosen weights, and which weights these are."""
  (curvature,) = run.curvatures.values()
  params = jax.tree.map(np.array, variables['params'])
  kept: dict[str, Any] = {'step': np.zeros((), np.int32)}
  for block in curvature.blocks:
    name = block.name.removesuffix('/kernel')
    if name not in chosen:
      continue
    signs, scale = chosen[name]
    shape = params[name]['kernel'].shape
    kernel = lambda m, b=block, s=shape: _as_kernel(b, m, s)  # noqa: E731
    params[name]['kernel'] = kernel(signs * scale).astype(np.float32)
    kept[name] = {'kept': kernel(signs) != 0}
  return {**variables, 'params': params, 'edge': kept}


def _as_kernel(block: Any, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  if len(block.params) > 1:  # the bias of a head is the last row
    matrix = np.concatenate([matrix, np.zeros((1, matrix.shape[1]))])
  return np.asarray(block.operator.from_matrix(jnp.asarray(matrix[None], jnp.float32))[0]).reshape(shape)


def _leaf(params: Any, name: str) -> jax.Array:
  for key in name.split('/'):
    params = params[key]
  return params


def _with(run: Run, variables: dict[str, Any]) -> TrainState:
  """Returns a new state with these variables, and what they lack as it begins."""
  state = run.init(run.config.seed)
  model_state = {k: variables.get(k, v) for k, v in state.model_state.items()}
  like = lambda new, old: jnp.asarray(new, old.dtype)  # noqa: E731
  return state._replace(
    params=jax.tree.map(like, variables['params'], state.params),
    model_state=jax.tree.map(like, model_state, state.model_state),
  )


def _normed(run: Run, state: TrainState, batches: int) -> TrainState:
  """Returns the state with the batch norms' averages over `batches` batches, with equal weights."""
  model = run.task.model

  @jax.jit
  def moments(batch):
    zero = {**state.model_state, 'batch_stats': jax.tree.map(jnp.zeros_like, state.model_state['batch_stats'])}
    _, new = model.apply({'params': state.params, **zero}, batch['inputs'], train=True, mutable=list(zero))
    return jax.tree.map(lambda x: x / (1 - MOMENTUM), new['batch_stats'])

  sums = None
  for _, batch in zip(range(batches), run.train_batches(run.config.seed, 0), strict=False):
    new = moments(batch)
    sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
  stats = jax.tree.map(lambda x: x / batches, sums)
  return state._replace(model_state={**state.model_state, 'batch_stats': stats})

"""Tasks whose input is a graph: the graph itself, the model's settings that follow from it, and the losses.

A batch has these arrays; at evaluation it also has `mask` (b,), which is 0 for the examples that fill it up.
  links: inputs (b, 2), an entity and a relation; label (b,), the entity at the other end; at evaluation known (b, k), the
    entities that are right too, -1 for none.
  zero_shot: inputs (b, h, w, c), label (b,).
  directed: inputs (b, t, h, w, 1), query (b,), a node; label (b,), the motion of its garment; other (b,), that of the
    other garment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from .. import data, kron, models
from ..train import masked
from ..train.errors import ConfigError
from ..train.graph_data import known_graph
from ..train.registry import TASKS
from ..train.task import Task, make_model


def make_task(config: Any, parts: int = 1) -> Task:
  """Makes the task that the config names, with the model's graph in `parts` parts.

  Raises:
    ConfigError: the task is zero_shot, and no classes or all classes are held out.
  """
  _check(config)
  model, entry, loss = make_model(config, **settings(config, parts)), TASKS[config.task], LOSSES[config.task]
  return Task(model, loss(model, config), entry.target, entry.lower_is_better, SCORES.get(config.task, dict))


def settings(config: Any, parts: int) -> dict[str, Any]:
  """Returns what a model takes beside `config.model`: its graph, and numbers that follow from it."""
  if config.model.name == 'link_predictor':
    graph = known_graph(config)
    relations = len(graph.relations)
    links = data.both_directions(graph.splits['train'], relations)
    return {'graph': _in_parts(config, len(graph.entities), links, 2 * relations, parts), 'relations': 2 * relations}
  nouns = data.read_nouns(config.data.graph_source)
  nodes, links = data.above(nouns, data.synsets(nouns))
  links = data.both_directions(links, 2)
  constants: dict[str, Any] = {'graph': _in_parts(config, len(nodes), links, 4, 1)}
  return (
    constants if config.model.name == 'directed_video' else {**constants, 'nodes': tuple(range(len(data.GARMENTS)))}
  )


def _in_parts(config: Any, nodes: int, links: Int[np.ndarray, 'n 3'], relations: int, parts: int) -> models.Graph:
  if config.data.graph_shuffled:
    links = data.permuted(links, nodes, config.data.graph_seed)
  return models.Graph(*data.partitioned(nodes, links, parts), relations=relations)


def links(model: nn.Module, config: Any) -> Callable:
  """Returns the loss of predicting the other end of a link among all nodes, which is the cross-entropy.

  Evaluation adds the mean reciprocal rank and hits, both filtered.
  """
  del config

  def loss(params, model_state, batch, train=True):
    logits = model.apply({'params': params, **model_state}, batch['inputs'], train=train)
    logits = kron.observe.categorical(logits, batch['label'], mask=masked.counted(batch))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    value = masked.mean(each, batch)
    metrics = {'loss': value}
    if 'known' in batch:
      rank = ranks(logits, batch['label'], batch['known'])
      metrics['mrr'] = masked.mean(1 / rank, batch)
      metrics |= {f'hits{k}': masked.mean(rank <= k, batch) for k in (1, 10)}
    return value, (metrics, model_state)

  return loss


def ranks(logits: Float[Array, 'b nodes'], label: Int[Array, ' b'], known: Int[Array, 'b k']) -> Float[Array, ' b']:
  """Returns the rank of the label among nodes that are not also known to be right (Bordes et al. 2013, 'filtered').

  Nodes with the same score count half (pykeen's 'realistic' rank), so that a model that scores all nodes alike is not
  the best. A model whose scores are not numbers is not the best either: its rank is the last.
  """
  score = jnp.take_along_axis(logits, label[:, None], 1)
  other = jnp.where((known >= 0) & (known != label[:, None]), known, logits.shape[1])  # out of range, hence dropped
  rows = jnp.arange(len(logits))[:, None]
  against = logits.at[rows, other].set(-jnp.inf, mode='drop')
  ranks = 1 + (against > score).sum(1) + ((against == score).sum(1) - 1) / 2
  return jnp.where(jnp.isnan(logits).any(1), logits.shape[1], ranks)


def zero_shot(model: nn.Module, config: Any) -> Callable:
  """Returns the loss of classification if some classes have no images in training; see `zero_shot_scores`."""
  classes = len(data.GARMENTS)
  unseen = np.isin(np.arange(classes), config.data.held_out)
  among = np.cumsum(~unseen) - 1  # the index of a seen class among the seen classes

  def loss(params, model_state, batch, train=True):
    logits = model.apply({'params': params, **model_state}, batch['inputs'], train=train)
    label, seen = batch['label'], jnp.asarray(~unseen)[batch['label']]
    trained = kron.observe.categorical(logits[:, ~unseen], jnp.asarray(among)[label], mask=masked.counted(batch))
    each = optax.softmax_cross_entropy_with_integer_labels(trained, jnp.where(seen, jnp.asarray(among)[label], 0))
    value = masked.mean(each * seen, batch)
    if train:
      return value, ({'loss': value}, model_state)
    right = logits.argmax(-1) == label
    best_unseen = jnp.where(jnp.asarray(unseen), logits, -jnp.inf).argmax(-1) == label
    parts = {'loss': each * seen, 'seen': right & seen, 'unseen': right & ~seen, 'zero_shot': best_unseen & ~seen}
    parts['share_seen'] = seen
    return value, ({k: masked.mean(v, batch) for k, v in parts.items()}, model_state)

  return loss


def zero_shot_scores(means: dict[str, float]) -> dict[str, float]:
  """Computes the scores of seen and unseen classes from the means of the metrics.

  zero_shot: the accuracy on unseen classes, chosen among those alone. seen, unseen: the accuracies among all classes.
  harmonic: the harmonic mean of these two (Xian et al. 2018, arXiv:1707.00600, eq. 15).
  """
  share = means.pop('share_seen')
  metrics = {k: v / max(share if k in ('loss', 'seen') else 1 - share, 1e-9) for k, v in means.items()}
  total = metrics['seen'] + metrics['unseen']
  return {**metrics, 'harmonic': 2 * metrics['seen'] * metrics['unseen'] / total if total else 0.0}


def directed(model: nn.Module, config: Any) -> Callable:
  """Returns the loss of classifying what the garment that the noun names does.

  Evaluation also covers nouns that training has not used, and how often the answer is what the other garment does. A
  model that ignores the noun gives either answer equally often.
  """
  new = jnp.asarray(tuple(config.data.held_out) or (-1,))

  def loss(params, model_state, batch, train=True):
    logits = model.apply({'params': params, **model_state}, batch['inputs'], batch['query'], train=train)
    logits = kron.observe.categorical(logits, batch['label'], mask=masked.counted(batch))
    value = masked.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']), batch)
    right = logits.argmax(-1) == batch['label']
    metrics = {'loss': value, 'accuracy': masked.mean(right, batch)}
    if not train:
      unasked = jnp.isin(batch['query'], new)
      metrics |= {'new_nouns': masked.mean(right & unasked, batch), 'share_new': masked.mean(unasked, batch)}
      metrics['other'] = masked.mean(logits.argmax(-1) == batch['other'], batch)
    return value, (metrics, model_state)

  return loss


def directed_scores(means: dict[str, float]) -> dict[str, float]:
  """Computes the scores from the means of the metrics. new_nouns: the accuracy on nouns that training has not used."""
  share, right = means.pop('share_new'), means.pop('new_nouns')
  return {**means, 'new_nouns': right / share} if share else means


def _check(config: Any) -> None:
  """Raises ConfigError if zero_shot does not hold out some, but not all, of the classes."""
  held_out, classes = tuple(config.data.held_out), len(data.GARMENTS)
  if config.task == 'zero_shot' and not (0 < len(set(held_out)) < classes and set(held_out) <= set(range(classes))):
    raise ConfigError(f'config.data.held_out={held_out}: name some of the classes 0 to {classes - 1}, not all')


LOSSES = {'directed': directed, 'links': links, 'zero_shot': zero_shot}
SCORES = {'directed': directed_scores, 'zero_shot': zero_shot_scores}

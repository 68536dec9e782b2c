"""Which weights become zero, and which +s or -s, by the curvature of the loss.

A layer with weights W (inputs, outputs) and K-FAC's factors A and G has the curvature A x G: to move W by E costs
1/2 tr(E' A E G). In place of one weight at a time, as Optimal Brain Surgeon does (Hassibi and Stork 1993, eq. 5), all
weights of a layer are visited again and again, and each takes the value of {-s, 0, s} at which the cost, and the price of
a weight that is not zero, are least given the others (coordinate descent). The price is the same in all layers, so that
zeros fall where they cost least; bisection finds the price that meets the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SWEEPS = 4


class Layer(NamedTuple):
  """A layer to choose for.

  a, g: its factors. price: of a weight that is not zero, in units of the budget. one_scale: whether all output channels
    have the same scale, as a head's do.
  """

  weight: Float[np.ndarray, 'inputs outputs']
  a: Float[np.ndarray, 'inputs inputs']
  g: Float[np.ndarray, 'outputs outputs']
  price: float = 1.0
  one_scale: bool = False


class Chosen(NamedTuple):
  """A layer's ternary weights: signs in {-1, 0, 1}, and what 1 is worth in each output channel."""

  signs: Float[np.ndarray, 'inputs outputs']
  scale: Float[np.ndarray, ' outputs']


def cost(layer: Layer, chosen: Chosen) -> float:
  """Returns how much the loss grows: 1/2 tr(E' A E G), where E is the change of the weights."""
  change = chosen.signs * chosen.scale - layer.weight
  return 0.5 * float(((layer.a @ change @ layer.g) * change).sum())


def by_magnitude(weight: Float[np.ndarray, 'inputs outputs'], nonzero: int) -> Chosen:
  """Keeps the `nonzero` largest weights; s is their mean in each output channel."""
  order = np.argsort(-np.abs(weight), axis=None, kind='stable')[:nonzero]
  kept = np.zeros(weight.size, bool)
  kept[order] = True
  kept = kept.reshape(weight.shape)
  scale = (np.abs(weight) * kept).sum(0) / np.maximum(kept.sum(0), 1)
  return Chosen(np.sign(weight) * kept, scale)


def at_price(layer: Layer, price: float, start: Chosen, sweeps: int = SWEEPS) -> Chosen:
  """Moves each weight to the value at which its cost and its price are least, `sweeps` times through the layer.

  The scales are fitted after every sweep. Of G only the diagonal is used: with it the output channels do not depend on
  each other, and no sweep raises the cost.
  """
  signs, scale = start.signs.copy(), start.scale.copy()
  diagonal = np.diag(layer.g)
  values = np.array([-1.0, 0.0, 1.0])[:, None]
  for _ in range(sweeps):
    change = signs * scale - layer.weight
    slope = layer.a @ change * diagonal  # the derivative of the cost by each weight
    for i in range(len(signs)):
      step = (values - signs[i]) * scale
      growth = step * slope[i] + 0.5 * layer.a[i, i] * diagonal * step**2
      best = (growth + price * layer.price * np.abs(values)).argmin(0)
      move = step[best, np.arange(len(scale))]
      if move.any():
        signs[i] = values[best, 0]
        slope += np.outer(layer.a[:, i], move * diagonal)
    scale = fitted(layer, signs, scale)
  return Chosen(signs, scale)


def fitted(layer: Layer, signs: Float[np.ndarray, 'inputs outputs'], old: np.ndarray) -> Float[np.ndarray, ' outputs']:
  """Returns the scales at which the cost is least: (q' A w) / (q' A q) of each channel, the old one where that is none."""
  moved = layer.a @ signs
  below, above = (moved * signs).sum(0), (moved * layer.weight).sum(0)
  if layer.one_scale:
    each = np.diag(layer.g)
    below, above = (np.full_like(x, (x * each).sum()) for x in (below, above))
  good = (below > 0) & (above > 0)
  return np.where(good, above / np.where(good, below, 1), old)


def under_budget(layers: Mapping[str, Layer], budget: float, steps: int = 20) -> dict[str, Chosen]:
  """Chooses the weights of all layers so that the prices of those that are not zero add up to at most `budget`.

  Args:
    budget: in the units of the layers' prices, such as LUTs or bytes; with prices of 1, a number of weights.
    steps: of the bisection for the price.
  """
  chosen = {name: by_magnitude(layer.weight, layer.weight.size) for name, layer in layers.items()}
  low, high = 1e-12, 1.0
  while _spent(layers, best := _all_at(layers, high, chosen)) > budget:
    high *= 100
  for _ in range(steps):
    middle = float(np.sqrt(low * high))
    tried = _all_at(layers, middle, chosen)
    if _spent(layers, tried) > budget:
      low, chosen = middle, tried  # a larger price begins from here
    else:
      high, best = middle, tried
  return best


def _all_at(layers: Mapping[str, Layer], price: float, start: Mapping[str, Chosen]) -> dict[str, Chosen]:
  return {name: at_price(layer, price, start[name]) for name, layer in layers.items()}


def _spent(layers: Mapping[str, Layer], chosen: Mapping[str, Chosen]) -> float:
  return sum(layer.price * float(np.count_nonzero(chosen[name].signs)) for name, layer in layers.items())

"""The networks of a run, each with its loss and its optimiser: one in an ordinary run, two with a generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from .. import kron

ONLY = 'model'  # a run's only player, whose trees are the run's; the trees of several players are dicts by player


class Player(NamedTuple):
  """One network in training.

  config: the run's config as this player's optimiser reads it.
  loss: (params, context, batch) -> (loss, (metrics, the network's new state)).
  curvature: the curvature of the loss, if the optimiser is of second order.
  """

  name: str
  config: Any
  loss: Callable
  curvature: kron.Curvature | None
  tx: optax.GradientTransformationExtraArgs


class Game(NamedTuple):
  """The rules by which several players are trained together.

  turns: the players' names in the order of their moves within a step. Move number n takes part n modulo `parts` of the
    batch. Statistics and inverses are renewed at a player's first move.
  losses: each player's loss, as in `Player`.
  variables: (player, key) -> the network's variables, in flax's boxes.
  example: the shapes of the batch that a player's loss takes.
  context: (player, params, states) -> the context that its loss takes, from all parameters and states.
  config_of: (player) -> the config as its optimiser reads it.
  deal: (player, params, states, part of the batch, two keys) -> (context, batch) of a move.
  added: (player, params, states, batch of the move) -> a gradient to add to that of the loss; None for nothing.
  total: (metrics of a step) -> the number by which the step is judged to be sound or not.
  evaluate: (state, batch) -> metrics, as means over the examples, with the number of examples under 'examples'.
  draw: (state) -> a picture (h, w, c) of bytes of what the run generates.
  """

  turns: tuple[str, ...]
  parts: int
  losses: Mapping[str, Callable]
  variables: Callable
  example: Any
  context: Callable
  config_of: Callable[[str], Any]
  deal: Callable
  added: Callable
  total: Callable
  evaluate: Callable
  draw: Callable

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(self.losses)


def part(tree: Any, name: str) -> Any:
  """Returns one player's part of a tree of all players."""
  return tree if name == ONLY else tree[name]


def with_part(tree: Any, name: str, part: Any) -> Any:
  """Returns the tree with one player's part replaced."""
  return part if name == ONLY else {**tree, name: part}


def joined(parts: Mapping[str, Any]) -> Any:
  """Returns the tree of all players from their parts."""
  return parts[ONLY] if ONLY in parts else dict(parts)

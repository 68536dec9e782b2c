"""The same parameters in other clothes: each a function that puts them on, and one that takes them off."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
from flax import nnx
from flax.core import FrozenDict


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Parts:
  trunk: Any
  heads: Any


class Module(eqx.Module):
  heads: Any
  trunk: Any


def _state(params):
  leaves, treedef = jax.tree.flatten(params)
  own = {f'p{k:02d}': nnx.Param(leaf) for k, leaf in enumerate(leaves)}
  _state.treedefs[len(leaves), str(treedef)] = treedef
  return nnx.State(own), treedef


_state.treedefs = {}


def _to_state(params):
  """A nnx.State of one level; the tree's structure is kept with it as a static field."""
  state, treedef = _state(params)
  return Held(state, treedef)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Held:
  state: Any
  treedef: Any = dataclasses.field(metadata={'static': True})


TREES = {
  'list': (lambda p: p, lambda p: p),
  'frozen': (lambda p: FrozenDict({'trunk': p['trunk'], 'heads': p['heads']}), lambda p: dict(p)),
  'dataclass': (lambda p: Parts(p['trunk'], p['heads']), lambda p: {'trunk': p.trunk, 'heads': p.heads}),
  'equinox': (lambda p: Module(p['heads'], p['trunk']), lambda p: {'trunk': p.trunk, 'heads': p.heads}),
  'nnx': (_to_state, lambda p: jax.tree.unflatten(p.treedef, jax.tree.leaves(p.state))),
}

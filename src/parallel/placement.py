"""Where K-FAC's stacked factors live: each device owns the leading index of every stack that carries its number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Placement(NamedTuple):
  """Factors dealt over all devices of a mesh; inverses return to every device (KAISA's COMM-OPT, Pauloski et al. 2021).

  `kron.kfac(..., placement=Placement(mesh))` runs each inverse on its owner only.
  """

  mesh: Mesh

  @property
  def owners(self) -> int:
    return self.mesh.size

  @property
  def spec(self) -> PartitionSpec:
    """Of an array that leads with the owner axis."""
    return PartitionSpec(tuple(self.mesh.axis_names))

  def over_stacks(self, fn: Callable) -> Callable:
    """`fn` of arrays that lead with the owner axis, run by each owner on its own part; every device gets the result."""
    local = jax.shard_map(fn, mesh=self.mesh, in_specs=self.spec, out_specs=self.spec)
    return lambda *stacks: self.replicate(local(*stacks))

  def replicate(self, values: Any) -> Any:
    """The same values on every device."""
    return jax.lax.with_sharding_constraint(values, NamedSharding(self.mesh, PartitionSpec()))

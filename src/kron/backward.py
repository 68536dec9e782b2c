"""One evaluation of a loss with probes, and the backward passes that turn it into statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..program import Op, Program, vary, varying
from .blocks.block import Block
from .blocks.plan import Plan
from .explicit import typed_as
from .measuring.evaluate import evaluate
from .measuring.observations import Number, Observed, largest, positive, shares
from .measuring.probes import Basis, Probes, where_due, with_basis, with_due, zero_probe
from .measuring.shards import Shards
from .operators import Unit
from .operators.factor import accurate
from .statistics import BlockSums

Due = Mapping[str, Mapping[str, Array]]  # by block and factor


def make_probes(
  plan: Plan, params: Mapping[str, Array], basis: Mapping[str, Basis], due: Mapping[str, Mapping[str, Array]]
) -> Probes:
  """Makes the probes of all blocks that have sites.

  Args:
    params: arrays by name.
    basis: bases by block, for the blocks that need second moments in a basis.
    due: flags by block and factor, for the blocks of which only some statistics are due.
  """
  probes = {}
  for b in plan.blocks:
    if b.name not in plan.probes:
      continue
    probe, loops = zero_probe(plan.probes[b.name], b.dtype), plan.loops[b.name]
    if b.name in basis:
      probe = with_basis(probe, b.operator, basis[b.name], loops, plan.shards.lead, b.dtype)
    if b.name in due:
      probe = with_due(probe, b.operator, due[b.name], loops)
    probes[b.name] = probe
  probes = plan.shards.typed(probes, plan.loops)
  # Inside a shard_map, statistics are summed over the same axes as gradients: those along which parameters are equal.
  for b in plan.blocks:
    if b.name in probes:
      axes = frozenset().union(*(varying(params[name]) for name in b.params))
      probes[b.name] = jax.tree.map(functools.partial(vary, axes=axes), probes[b.name])
  return probes


class Backward(NamedTuple):
  """A loss that has been evaluated with probes.

  run: (leaves, probes, factors) -> ((loss, observed outputs), (auxiliary outputs, the marks' other operands)).
  pull: (cotangent of the loss, cotangents of the outputs) -> (gradients of the leaves, cotangents of the probes).
  """

  plan: Plan
  names: tuple[str, ...]
  marks: Sequence[Op]
  leaves: Sequence[Array]
  probes: Probes
  basis: Mapping[str, Basis]
  due: Due
  run: Callable
  pull: Callable
  loss: Array
  outputs: list[Array]
  aux: Any
  observed: list[Observed]

  @classmethod
  def of(
    cls,
    program: Program,
    plan: Plan,
    marks: Sequence[Op],
    params: Mapping[str, Array],
    data: Sequence[Array],
    basis: Mapping[str, Basis],
    due: Due,
  ) -> Backward:
    """Evaluates the program with probes on data and on parameters, which are given by name."""
    probes, leaves, names = make_probes(plan, params, basis, due), list(params.values()), tuple(params)

    def run(leaves, probes, factors=None):
      outputs, marks = evaluate(program, plan.taps._replace(factors=factors), [*leaves, *data], probes)
      return (outputs[0], [mark[0] for mark in marks]), (outputs[1:], [mark[1:] for mark in marks])

    (loss, outputs), pull, (aux, extras) = jax.vjp(run, leaves, probes, has_aux=True)
    observed = [Observed.of(mark, z, extra) for mark, z, extra in zip(marks, outputs, extras, strict=True)]
    return cls(plan, names, marks, leaves, probes, basis, due, run, pull, loss, outputs, aux, observed)

  def of_loss(self) -> tuple[list[Array], Probes]:
    """Returns the gradient of the loss and the cotangents of the probes that come with it."""
    return self.pull((jnp.ones_like(self.loss), [jnp.zeros_like(z) for z in self.outputs]))

  def of_cotangents(self, cotangents: Sequence[Array]) -> dict[str, BlockSums]:
    """Returns the sums of a backward pass from these cotangents of the outputs.

    The cotangents are those of the summed log-likelihood, not of its mean.
    """
    typed = [typed_as(c, z) for c, z in zip(cotangents, self.outputs, strict=True)]
    return self._finished(*self.pull((jnp.zeros_like(self.loss), typed)))

  def of_own_gradient(
    self, grads: list[Array], sums: Probes, numbers: Sequence[Number], share: Sequence[Number]
  ) -> dict[str, BlockSums]:
    """Returns the sums for the gradient of the loss itself (the empirical Fisher).

    Args:
      grads, sums: the results of `of_loss`.
      numbers: the number of observations of each mark.
      share: the share of each mark, counting only the observations from which statistics are taken.
    """
    if all(isinstance(s, int) for s in (*share, *shares(numbers))):
      return self._finished(grads, sums)
    # The marks have different sizes, so a second pass weights the gradients that flow back through each of them.
    count = largest(numbers)
    factors = {
      mark.outputs[0].index: jnp.sqrt(jnp.asarray(s, jnp.float32)) * n / positive(count)
      for mark, s, n in zip(self.marks, share, numbers, strict=True)
    }
    _, again, _ = jax.vjp(functools.partial(self.run, factors=factors), self.leaves, self.probes, has_aux=True)
    return self._finished(*again((jnp.ones_like(self.loss), [jnp.zeros_like(z) for z in self.outputs])))

  def _finished(self, slopes: Sequence[Array], sums: Probes) -> dict[str, BlockSums]:
    """Makes statistics from the results of one backward pass."""
    by_name, result = dict(zip(self.names, slopes, strict=True)), {}
    for b in self.plan.blocks:
      if b.sampled_diagonal:
        squares = (accurate(by_name[b.name]).reshape(-1, 1, 1) ** 2).astype(b.dtype)
        result[b.name] = self.plan.shards.of_all(BlockSums({'F': squares}, {}))
      else:
        products = {k: _by_slot(s, self.plan, b) for k, s in sums[b.name].products.items()}
        sums_of_block = BlockSums(products, sums[b.name].uses)
        finish = functools.partial(_finish, b, sums_of_block, self.basis.get(b.name), self.plan.shards)
        result[b.name] = where_due(self.due.get(b.name, {}) if b.operator.reduced else {}, finish)
    return result


def _by_slot(s: Array, plan: Plan, block: Block) -> Array:
  """Merges the loop axes of a probe's cotangent into its slots, behind the axis of shards."""
  lead = plan.shards.lead if block.operator.reduced is None else ()
  s = jnp.moveaxis(s, len(plan.loops[block.name]), 0) if lead else s
  return s.reshape(*lead, -1, *s.shape[-2:])


def _finish(block: Block, sums: BlockSums, basis: Basis | None, shards: Shards) -> BlockSums:
  operator = block.operator
  if isinstance(operator, Unit) or operator.reduced is None or shards.trivial:
    return operator.finish(sums, basis)
  if block.whole_batch:
    return shards.of_all(operator.finish(sums, basis))
  kept = operator._replace(reduced=int(operator.reduced // shards.count * shards.subsample))
  uses = {k: s * kept.reduced / operator.reduced for k, s in sums.uses.items()}

  def finish(*parts: Array) -> BlockSums:
    return kept.finish(BlockSums(dict(zip(sums.products, parts, strict=True)), uses), basis)

  return shards.of_each(finish, list(sums.products.values()), [1] * len(sums.products))

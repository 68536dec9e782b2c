"""`curvature`: what `kron` knows of a loss, and its gradient together with the statistics of its factors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray

from ..program import Op, Program, has_mark, observation_marks, reduced_behind, trace, untracked, varying
from .backward import Backward, make_probes
from .blocks.block import Block
from .blocks.options import Options
from .blocks.plan import Plan, plan_blocks
from .blocks.table import table
from .errors import CurvatureError
from .measuring.evaluate import NOTHING, evaluate
from .measuring.fishers import exact, random_key
from .measuring.observations import Number, Observed, check_marks, largest, positive, shares
from .measuring.shards import WHOLE, Shards
from .operators.masks import check_used
from .param_trees import Parameters, param_names
from .placing import Placement
from .products import Outputs, Products, information_product, make_products, rank_one_product
from .reading.find_sites import find_sites
from .statistics import Statistics

FISHERS = ('sampled', 'empirical', 'exact')


def curvature(
  loss_fn: Callable,
  params: Any,
  *args: Any,
  fisher: str = 'sampled',
  has_aux: bool = False,
  fallback: Mapping[str, str] | str | None = None,
  examples: int | Callable[..., Any] | None = None,
  sharing: Mapping[str, str] | str = 'expand',
  approximation: Mapping[str, str] | str = 'kronecker',
  max_factor: int = 8192,
  oversize: str = 'diagonal',
  operators: Mapping[str, Callable] | None = None,
  blocks: Mapping[str, Mapping[str, int]] | None = None,
  part: float = 1.0,
  placement: Placement | None = None,
) -> Curvature:
  """Reads a loss and finds where each of its parameters meets data.

  Args:
    loss_fn: `loss_fn(params, *args)` -> scalar loss, a mean over the observations; with `has_aux`, (loss, aux). Its
      outputs are marked by `kron.observe`.
    params: pytree of arrays or ShapeDtypeStructs.
    *args: the loss's further arguments: batch, keys, state; arrays or ShapeDtypeStructs.
    fisher: 'sampled' draws targets from the model (one more backward pass), 'exact' sums over the square root of the
      likelihood's own Fisher information (as many backward passes as outputs), 'empirical' takes the loss's gradients.
    has_aux: as in jax.value_and_grad.
    fallback: what to do with parameters whose use is not understood, by name or fnmatch pattern: 'gradient' (left to
      the plain gradient) or 'diagonal' (squares of the batch's summed sampled gradient, which estimate the Fisher's
      diagonal without bias: Liu et al. 2023, eq. 12; with the empirical Fisher they are biased by the mean). One
      string stands for all parameters.
    examples: the number of observations that the loss is a mean over, or a function of its arguments that counts them,
      where no mark does.
    sharing: how a kernel that each example uses several times (positions, time steps, siamese branches) is treated, by
      name or pattern: 'expand' takes the uses for independent, 'reduce' sums over them first (Eschenhagen et al. 2023).
    approximation: of a kernel's block, by name or pattern: 'kronecker' (factors A and G), 'unit' (one matrix for each
      output unit, of an embedding its diagonal) or 'diagonal'. Scales, shifts and free parameters are unit-wise anyway.
    max_factor: the largest matrix kept whole; the table shows which are not. A larger unit-wise block becomes diagonal.
    oversize: what larger ones become: 'diagonal', or 'blocks' of at most that size along the diagonal.
    operators: for a function with a derivative rule of its own (or a primitive) whose inside is not understood, by its
      name: the same function written plainly. Statistics are then those of the plain one, value and gradient its own.
    blocks: of kernels' factors, by name or pattern: {'*/mlp_in/kernel': {'G': 4}} keeps G as 4 blocks along its diagonal,
      as where a layer's columns lie on 4 devices (its rows: A); `parallel.shard_blocks` makes it. Another approximation:
      whole factors are the default on any mesh.
    placement: the one of the optimiser: it says into how many shards the batch is divided, and where the statistics of each
      are taken. Statistics then lead with an axis of shards, which `kfac(..., placement=)` adds up at the owners of the
      factors.
    part: the share of each shard's examples from which statistics are taken, the first of each.

  Returns:
    A `Curvature`; print it to see what is covered.

  Raises:
    CurvatureError: a use is not understood and has no fallback; a parameter is unused; the likelihood is not marked.
  """
  _known(fisher)
  everywhere = lambda choice: {'*': choice} if isinstance(choice, str) else dict(choice or {})  # noqa: E731
  by_shard = Shards(1, part, placement)
  options = Options(
    everywhere(fallback), everywhere(sharing), everywhere(approximation), max_factor, oversize, by_shard, blocks or {}
  )
  return Curvature(loss_fn, params, args, fisher, has_aux, options, examples, dict(operators or {}))


class Curvature:
  """The block structure of a loss's curvature. Immutable; made by `curvature`."""

  def __init__(self, loss_fn, params, args, fisher, has_aux, options, examples, operators):
    self.loss_fn, self.fisher, self.has_aux = loss_fn, fisher, has_aux
    self._options, self._examples, self._operators = options, examples, operators
    self.parameters = Parameters.of(params)
    _, plan, _ = self._read(params, args)
    self.blocks: tuple[Block, ...] = plan.blocks
    self.gradient_only: dict[str, str] = plan.gradient_only
    self.regularised: tuple[str, ...] = plan.regularised

  def __str__(self) -> str:
    return table(self.blocks, self.gradient_only, self.regularised, self.parameters.sizes)

  def __repr__(self) -> str:
    return f'<Curvature of {len(self.parameters.names)} parameters, {len(self.blocks)} blocks, {self.fisher} Fisher>'

  def value_and_grad(
    self,
    params: Any,
    *args: Any,
    key: PRNGKeyArray | None = None,
    statistics: bool | Bool[Array, ''] | Mapping[str, Mapping[str, Bool[Array, '']]] = True,
    basis: Mapping[str, Mapping[str, Array]] | None = None,
  ) -> tuple[Any, Any, Statistics | None]:
    """The loss (or (loss, aux)), its gradient, and the statistics of this batch.

    Args:
      params: as given to `curvature`; shapes of the batch may differ.
      *args: as given to `curvature`.
      key: for the targets of a sampled Fisher and the signs of an exact one. If None, it is folded out of the only PRNG
        key among `args`; without one the exact Fisher's signs are the same at every call.
      statistics: False leaves them out and returns None in their place: the plain gradient. A traced boolean decides
        on the device; where it is false the statistics are zeros with `examples == 0`, which an update ignores. Booleans
        by block and factor (`kron.due`) decide for each factor; the sums of the others are zeros.
      basis: from `kron.basis`: the statistics then have second moments in that basis too, as `scale_by_ekfac` needs.

    Raises:
      CurvatureError: the loss now has other sites than when `curvature` read it, or there is no key.
    """
    if isinstance(statistics, bool):
      return self._with(params, args, key, basis, {}) if statistics else (*self._plain(params, args), None)
    due: Mapping = {}
    if isinstance(statistics, Mapping):
      due, statistics = statistics, functools.reduce(jnp.logical_or, jax.tree.leaves(statistics), False)

    def without(*all_of):
      shapes = jax.eval_shape(self._with, *all_of)[2]
      return *self._plain(params, args), jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return jax.lax.cond(statistics, self._with, without, params, args, key, basis, due)

  def products(self, params: Any, *args: Any, key: PRNGKeyArray | None = None, fisher: str | None = None) -> Products:
    """Products of the loss's curvature with vectors, at these parameters and this batch.

    Args:
      params, *args: as given to `curvature`; shapes of the batch may differ.
      key: for the targets of a sampled Fisher, as in `value_and_grad`.
      fisher: in place of the curvature's own; 'exact' costs no more here, and is free of noise.

    Raises:
      CurvatureError: at a product that needs marks where there are none, or where they are inside of a loop.
    """
    program, _, marks = self._read(params, args)
    fisher = _known(fisher or self.fisher)
    data = jax.tree.leaves(args)

    def run(leaves, offsets=None):
      outputs, found = evaluate(program, NOTHING, [*leaves, *data], {}, offsets=offsets)
      return outputs[0], found

    def loss(params):
      value = self.loss_fn(params, *args)
      return value[0] if self.has_aux else value

    if not marks:
      return make_products(loss, params, None)
    leaves = jax.tree.leaves(params)
    observed = [Observed.of(mark, found[0], found[1:]) for mark, found in zip(marks, run(leaves)[1], strict=True)]
    numbers = self._numbers(observed, params, args, averaged=untracked(reduced_behind(program, marks)))
    read = [o.prepared() for o in observed]

    def tail(offsets):
      if any(op.bodies and has_mark(op) for op in program.ops):
        raise CurvatureError('the Gauss-Newton product needs the marks (kron.observe) outside of loops and branches')
      return run(leaves, offsets)[0]

    def information(along):
      """F_z times a vector, divided by the numbers of observations."""
      if fisher == 'exact':
        products = [information_product(o.likelihood, z, u) for o, z, u in zip(observed, read, along, strict=True)]
      else:
        if fisher == 'sampled':
          keys = jax.random.split(random_key(key, args, program), len(observed))
          slopes = [o.likelihood.draw(k, z) for o, k, z in zip(observed, keys, read, strict=True)]
        else:
          # A term is a mean; an observation's own gradient is as many times larger.
          slopes = jax.grad(tail)([jnp.zeros_like(o.outputs) for o in observed])
          slopes = [g * n for g, n in zip(slopes, numbers, strict=True)]
        events = [o.likelihood.event_ndims for o in observed]
        products = [rank_one_product(c, u, n) for c, u, n in zip(slopes, along, events, strict=True)]
      each = [
        1 / positive(n if isinstance(n, int) else jnp.asarray(n, o.outputs.real.dtype))
        for o, n in zip(observed, numbers, strict=True)
      ]
      if fisher == 'empirical':  # the loss has masks and weights in it
        return [u * jnp.asarray(share, u.real.dtype) for u, share in zip(products, each, strict=True)]
      return [o.times_share(u, share) for o, u, share in zip(observed, products, each, strict=True)]

    return make_products(loss, params, Outputs(lambda leaves: [m[0] for m in run(leaves)[1]], information, tail))

  def _plain(self, params: Any, args: tuple) -> tuple[Any, Any]:
    return jax.value_and_grad(self.loss_fn, has_aux=self.has_aux)(params, *args)

  def _with(
    self, params: Any, args: tuple, key: PRNGKeyArray | None, basis: Any, due: Mapping
  ) -> tuple[Any, Any, Statistics]:
    program, plan, marks = self._read(params, args)
    if [b.signature() for b in plan.blocks] != [b.signature() for b in self.blocks]:
      raise CurvatureError('the loss uses its parameters otherwise than when kron.curvature read it; call that again')
    leaves, treedef = jax.tree.flatten(params)
    names, basis = param_names(params), basis or {}
    probes = make_probes(plan, dict(zip(names, leaves, strict=True)), basis, due)
    backward = Backward.of(program, plan, marks, leaves, jax.tree.leaves(args), probes, basis, due, names)
    observed, loss = backward.observed, backward.loss
    # Inside of a shard_map: the loss is a mean over the axes along which it is the same, statistics are summed over those
    # along which parameters are.
    apart = functools.reduce(frozenset.intersection, (varying(leaf) for leaf in leaves))
    averaged = untracked(reduced_behind(program, marks))
    numbers = self._numbers(observed, params, args, without=varying(loss), averaged=averaged)
    kept = self._numbers(observed, params, args, plan.shards, apart, averaged)
    grads, sums = backward.of_loss()
    if self.fisher == 'empirical':
      sums = backward.of_own_gradient(grads, sums, numbers, shares(kept))
    elif self.fisher == 'sampled':
      keys = jax.random.split(random_key(key, args, program), len(observed))
      drawn = [
        o.scaled(o.likelihood.draw(_apart(k, o), o.prepared()), share)
        for o, k, share in zip(observed, keys, shares(kept), strict=True)
      ]
      sums = backward.of_cotangents(drawn)
    else:
      key = random_key(key, args, program, otherwise=0)
      sums = exact(backward.of_cotangents, observed, shares(kept), [_apart(key, o) for o in observed])
    examples = jnp.asarray(largest(kept), jnp.promote_types(loss.dtype, jnp.float32))
    stats = Statistics.of(sums, examples)
    if self.fisher == 'empirical':
      stats = stats.of_loss_times(largest(numbers))  # of the sum over observations, not of the mean
    value = (loss, jax.tree.unflatten(plan.aux_tree, backward.aux)) if self.has_aux else loss
    return value, jax.tree.unflatten(treedef, grads), stats

  def _read(self, params: Any, args: tuple) -> tuple[Program, Plan, list[Op]]:
    """Traces the loss anew (as JAX does with any function) and plans its blocks; also the marks."""
    program, shapes = trace(self.loss_fn, params, *args, operators=self._operators)
    check_used(program)
    loss_shape = shapes[0] if self.has_aux else shapes
    if getattr(loss_shape, 'shape', None) != ():
      raise CurvatureError(
        f'the loss must be one number, but the function returns {loss_shape}; has_aux={self.has_aux}'
      )
    names = param_names(params)
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
      if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise CurvatureError(f'parameter {name!r} has type {jnp.result_type(leaf)}; parameters must be real numbers')
    if not names:
      raise CurvatureError('there are no parameters')
    marks = observation_marks(program)
    if self.fisher != 'empirical' and not marks:
      raise CurvatureError(
        f"fisher={self.fisher!r} needs the likelihood: mark the network's outputs in the loss by kron.observe.categorical, "
        "bernoulli, gaussian or custom, or choose fisher='empirical'"
      )
    inside = {mark.outputs[0].index for mark in marks}
    if any(getattr(mark.inputs[0], 'index', None) in inside for mark in marks):
      raise CurvatureError('an output is observed twice, which would count its curvature twice; mark it once')
    if not marks and self._examples is None:
      raise CurvatureError('nothing counts the observations: mark the outputs by kron.observe, or pass examples=')
    sizes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    lengths = tuple(dict.fromkeys(mark.outputs[0].shape[0] for mark in marks if _leads(mark)))
    if not marks and isinstance(self._examples, int):
      lengths = (self._examples,)
    shards = self._options.shards.fitted(lengths)
    shards.check(lengths)
    from_loss = self.fisher == 'empirical'
    found = find_sites(program, len(names), from_loss, lengths)
    check_marks(found.marks, self._examples is not None)
    plan = plan_blocks(program, found, names, sizes, self._options._replace(shards=shards), from_loss, lengths)
    plan = plan._replace(aux_tree=jax.tree.structure(shapes[1]) if self.has_aux else None)
    return program, plan, marks

  def _numbers(
    self,
    observed: Sequence[Observed],
    params: Any,
    args: tuple,
    shards: Shards = WHOLE,
    without: frozenset[str] = frozenset(),
    averaged: frozenset[str] = frozenset(),
  ) -> list[Number]:
    """The number of observations of each mark, or of those among them that statistics are taken of.

    without: mesh axes of a shard_map over which they are not counted together.
    averaged: see `Observed.number`.
    """
    given = self._examples(params, *args) if callable(self._examples) else self._examples
    if given is not None:
      return [given * shards.subsample if shards.subsample != 1 else given] * max(1, len(observed))
    return [o.number(shards, varying(o.outputs) - without, averaged) for o in observed]


def _leads(mark: Op) -> bool:
  """Whether the marked outputs have an axis of observations."""
  return len(mark.outputs[0].shape) > mark.params['likelihood'].event_ndims


def _apart(key: PRNGKeyArray, observed: Observed) -> PRNGKeyArray:
  """A key of its own for each device of a shard_map that has observations of its own."""
  for axis in sorted(varying(observed.outputs)):
    key = jax.random.fold_in(key, jax.lax.axis_index(axis))
  return key


def _known(fisher: str) -> str:
  if fisher not in FISHERS:
    raise CurvatureError(f'fisher={fisher!r} is unknown; choose from {", ".join(FISHERS)}')
  return fisher

"""Reads a loss (`curvature`), and computes its gradient with the statistics of the factors (`Curvature`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..program import Op, Program, has_mark, observation_marks, reduced_behind, trace, untracked, varying
from .backward import Backward
from .blocks.block import Block
from .blocks.options import Options
from .blocks.plan import Plan, plan_blocks
from .blocks.table import table
from .errors import CurvatureError
from .measuring.evaluate import NOTHING, evaluate
from .measuring.fishers import exact, random_key
from .measuring.observations import Number, Observed, check_marks, largest, positive, shares
from .measuring.shards import WHOLE, Shards
from .measuring.sums import warn_of_sum
from .operators.masks import check_used
from .param_trees import Parameters, check_arrays, param_names
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
  subsample: float = 1.0,
  placement: Placement | None = None,
) -> Curvature:
  """Reads a loss and finds where each of its parameters meets data.

  Args:
    loss_fn: `loss_fn(params, *args)` -> scalar loss, a mean over the observations; with `has_aux`, (loss, aux). It
      marks its outputs by `kron.observe`.
    params: pytree of arrays or ShapeDtypeStructs.
    *args: the other arguments of the loss (batch, keys, state), as arrays or ShapeDtypeStructs.
    fisher: 'sampled' draws targets from the model (one more backward pass); 'exact' sums over the columns of a square
      root of the likelihood's Fisher information (as many backward passes as outputs); 'empirical' uses the gradients
      of the loss itself.
    has_aux: as in jax.value_and_grad.
    fallback: what to do, by name or fnmatch pattern, with parameters whose use is not understood. One string stands for
      all parameters. 'gradient' leaves them to the plain gradient. 'diagonal' squares the batch's summed sampled
      gradient, which estimates the Fisher's diagonal without bias (Liu et al. 2023, eq. 12). With the empirical Fisher,
      the mean gradient biases this estimate.
    examples: the number of observations that the loss averages over, or a function of its arguments that counts them;
      needed where no mark counts them.
    sharing: how a kernel that each example uses several times (positions, time steps, siamese branches) is treated, by
      name or pattern: 'expand' treats the uses as independent, 'reduce' sums over them first (Eschenhagen et al. 2023).
    approximation: the approximation of a kernel's block, by name or pattern: 'kronecker' (factors A and G), 'unit' (one
      matrix for each output unit; for an embedding, its diagonal) or 'diagonal'. Scales, shifts and free parameters
      always have unit-wise blocks.
    max_factor: the size of the largest matrix that is kept whole; the printed table shows which ones are not. A larger
      unit-wise block becomes diagonal.
    oversize: the form of larger factors: 'diagonal', or 'blocks' of at most `max_factor` along the diagonal.
    operators: by name, plain versions of functions that have their own derivative rule (or of primitives) and whose
      inside is not understood. The statistics then come from the plain version. The value and the gradient come from
      the original function.
    blocks: the number of diagonal blocks in kernels' factors, by name or pattern. {'*/mlp_in/kernel': {'G': 4}} keeps G
      as 4 blocks along its diagonal, for a layer whose columns are sharded over 4 devices; for sharded rows, give 'A'.
      `parallel.shard_blocks` makes this argument. The blocks are a different approximation: by default factors are
      whole on any mesh.
    subsample: the fraction of each shard's examples, counted from the first, from which statistics are taken.
    placement: the optimiser's placement. It says into how many shards the batch is divided, and where the statistics of
      each shard are computed. Statistics then lead with an axis of shards, which `kfac(..., placement=)` adds up at the
      owners of the factors.

  Returns:
    A `Curvature`; print it to see which parameters are covered.

  Raises:
    CurvatureError: a use is not understood and has no fallback; a parameter is unused; the likelihood is not marked; a
      choice is unknown, or is made for a pattern that matches no parameter.
  """
  _known(fisher)
  everywhere = lambda choice: {'*': choice} if isinstance(choice, str) else dict(choice or {})  # noqa: E731
  by_shard = Shards(1, subsample, placement)
  options = Options(
    fisher=fisher,
    has_aux=has_aux,
    examples=examples,
    operators=dict(operators or {}),
    fallback=everywhere(fallback),
    sharing=everywhere(sharing),
    approximation=everywhere(approximation),
    max_factor=max_factor,
    oversize=oversize,
    shards=by_shard,
    blocks=blocks or {},
  )
  return Curvature(loss_fn, params, args, options)


class Curvature:
  """Holds the block structure of a loss's curvature. It is immutable; `curvature` makes it.

  Args:
    loss_fn: the loss, as given to `curvature`.
    params: the parameters, a pytree of arrays or ShapeDtypeStructs.
    args: the other arguments of the loss.
    options: the choices that `curvature` takes as keywords.

  Attributes:
    loss_fn: the loss.
    fisher: 'sampled', 'exact' or 'empirical'.
    has_aux: whether the loss returns (loss, aux).
    parameters: the names and shapes of the parameters, in the order of jax.tree.leaves.
    blocks: the blocks, in the order of the parameters. Each has a `name`, that of its first parameter, and the names of
      its parameters in `params`.
    gradient_only: the parameters without a block, each with the reason.
    regularised: the parameters that have a block and also a separate term in the loss.
  """

  def __init__(self, loss_fn: Callable, params: Any, args: tuple, options: Options):
    self.loss_fn, self.fisher, self.has_aux = loss_fn, options.fisher, options.has_aux
    self._options = options
    self.parameters = Parameters.of(params)
    check_arrays(params, args)
    program, plan, marks = self._read(params, args)
    if marks and options.examples is None:
      warn_of_sum(program, marks)
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
    basis: Mapping[str, Mapping[str, Float[Array, 'slots n n']]] | None = None,
  ) -> tuple[Any, Any, Statistics | None]:
    """Returns the loss (or (loss, aux)), its gradient, and the statistics of this batch.

    Args:
      params: as given to `curvature`.
      *args: as given to `curvature`; shapes of the batch may differ.
      key: the key for the targets of a sampled Fisher and the signs of an exact one. If None, it is derived from the
        only PRNG key among `args`; without such a key, the exact Fisher uses the same signs at every call.
      statistics: False computes the plain gradient and returns None for the statistics. A traced boolean decides on
        the device; where it is false, the statistics are zeros with `examples == 0`, which an update ignores. Booleans
        by block and factor (`kron.due`) decide for each factor; the sums of factors that are not due are zeros.
      basis: a basis from `kron.basis`. The statistics then include second moments in it, as `scale_by_ekfac` needs.

    Raises:
      CurvatureError: the loss now uses its parameters differently than when `curvature` read it, or there is no key.
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
    """Returns the products of the loss's curvature with vectors, at these parameters and this batch.

    Args:
      params: as given to `curvature`.
      *args: as given to `curvature`; shapes of the batch may differ.
      key: the key for the targets of a sampled Fisher, as in `value_and_grad`.
      fisher: overrides the curvature's own choice; 'exact' costs no more here and is free of noise.

    Returns:
      A `Products`, whose functions take and return trees shaped like the parameters.

    Raises:
      CurvatureError: `fisher` is unknown. A product raises it too if it needs marks, and there are none or they are
        inside of a loop; or if it needs a key, and there is none.
    """
    program, _, marks = self._read(params, args)
    fisher = _known(fisher or self.fisher)
    data = jax.tree.leaves(args)

    def run(leaves, offsets=None):
      outputs, marks = evaluate(program, NOTHING, [*leaves, *data], {}, offsets=offsets)
      return outputs[0], marks

    def loss(params):
      value = self.loss_fn(params, *args)
      return value[0] if self.has_aux else value

    if not marks:
      return make_products(loss, params, None)
    leaves = jax.tree.leaves(params)
    observed = [
      Observed.of(mark, operands[0], operands[1:]) for mark, operands in zip(marks, run(leaves)[1], strict=True)
    ]
    numbers = self._numbers(observed, params, args, averaged=untracked(reduced_behind(program, marks)))
    read = [o.prepared() for o in observed]

    def tail(offsets):
      if any(op.bodies and has_mark(op) for op in program.ops):
        raise CurvatureError('the Gauss-Newton product needs the marks (kron.observe) outside of loops and branches')
      return run(leaves, offsets)[0]

    def information(along):
      """Returns F_z times a vector, divided by the numbers of observations."""
      if fisher == 'exact':
        products = [information_product(o.likelihood, z, u) for o, z, u in zip(observed, read, along, strict=True)]
      else:
        if fisher == 'sampled':
          keys = jax.random.split(random_key(key, args, program), len(observed))
          slopes = [o.likelihood.draw(k, z) for o, k, z in zip(observed, keys, read, strict=True)]
        else:
          # Each term is a mean over n observations, so the gradient of one observation is n times larger.
          slopes = jax.grad(tail)([jnp.zeros_like(o.outputs) for o in observed])
          slopes = [g * n for g, n in zip(slopes, numbers, strict=True)]
        events = [o.likelihood.event_ndims for o in observed]
        products = [rank_one_product(c, u, n) for c, u, n in zip(slopes, along, events, strict=True)]
      each = [
        1 / positive(n if isinstance(n, int) else jnp.asarray(n, o.outputs.real.dtype))
        for o, n in zip(observed, numbers, strict=True)
      ]
      if fisher == 'empirical':  # the loss already contains masks and weights
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
    by_name = dict(zip(param_names(params), leaves, strict=True))
    backward = Backward.of(program, plan, marks, by_name, jax.tree.leaves(args), basis or {}, due)
    observed, loss = backward.observed, backward.loss
    # Inside a shard_map, the loss is a mean over the mesh axes along which it is replicated. Statistics are summed over
    # the mesh axes along which the parameters are replicated.
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
      stats = stats.of_loss_times(largest(numbers))  # statistics belong to the sum over observations, not the mean
    value = (loss, jax.tree.unflatten(plan.aux_tree, backward.aux)) if self.has_aux else loss
    return value, jax.tree.unflatten(treedef, grads), stats

  def _read(self, params: Any, args: tuple) -> tuple[Program, Plan, list[Op]]:
    """Traces the loss again (as JAX does with any function) and plans its blocks; returns the marks, too."""
    program, shapes = trace(self.loss_fn, params, *args, operators=self._options.operators)
    check_used(program)
    loss_shape = shapes[0] if self.has_aux else shapes
    if getattr(loss_shape, 'shape', None) != ():
      raise CurvatureError(
        f'the loss must be one number, but the function returns {loss_shape}; has_aux={self.has_aux}'
      )
    names = param_names(params)
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
      if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise CurvatureError(
          f'parameter {name!r} has type {jnp.result_type(leaf)}; parameters must be real numbers: give the others to '
          'the loss as another argument (nnx.split(model, nnx.Param, ...) in flax)'
        )
    if not names:
      raise CurvatureError('there are no parameters')
    marks = observation_marks(program)
    if self.fisher != 'empirical' and not marks:
      raise CurvatureError(
        f"fisher={self.fisher!r} needs the likelihood: mark the network's outputs in the loss with kron.observe."
        "categorical, bernoulli, gaussian or custom, or choose fisher='empirical'"
      )
    inside = {mark.outputs[0].index for mark in marks}
    if any(getattr(mark.inputs[0], 'index', None) in inside for mark in marks):
      raise CurvatureError('an output is observed twice, which would count its curvature twice; mark it once')
    if not marks and self._options.examples is None:
      raise CurvatureError('nothing counts the observations: mark the outputs by kron.observe, or pass examples=')
    sizes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    lengths = tuple(dict.fromkeys(mark.outputs[0].shape[0] for mark in marks if _leads(mark)))
    if not marks and isinstance(self._options.examples, int):
      lengths = (self._options.examples,)
    shards = self._options.shards.fitted(lengths)
    shards.check(lengths)
    from_loss = self.fisher == 'empirical'
    survey = find_sites(program, len(names), from_loss, lengths)
    check_marks(survey.marks, self._options.examples is not None)
    plan = plan_blocks(program, survey, names, sizes, self._options._replace(shards=shards), from_loss, lengths)
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
    """Returns the number of observations of each mark, counting only those that `shards` keeps for statistics.

    without: mesh axes of a shard_map over which observations are not counted together.
    averaged: see `Observed.number`.
    """
    given = self._options.examples(params, *args) if callable(self._options.examples) else self._options.examples
    if given is not None:
      return [given * shards.subsample if shards.subsample != 1 else given] * max(1, len(observed))
    return [o.number(shards, varying(o.outputs) - without, averaged) for o in observed]


def _leads(mark: Op) -> bool:
  """Returns whether the marked outputs have an axis of observations."""
  return len(mark.outputs[0].shape) > mark.params['likelihood'].event_ndims


def _apart(key: PRNGKeyArray, observed: Observed) -> PRNGKeyArray:
  """Makes the key differ between devices of a shard_map that hold different observations."""
  for axis in sorted(varying(observed.outputs)):
    key = jax.random.fold_in(key, jax.lax.axis_index(axis))
  return key


def _known(fisher: str) -> str:
  if fisher not in FISHERS:
    raise CurvatureError(f'fisher={fisher!r} is unknown; choose from {", ".join(FISHERS)}')
  return fisher

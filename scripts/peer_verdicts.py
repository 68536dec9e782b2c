"""Verdicts on kronmesh's and kfac-jax's statistics for every parameter of a program.

Both get the same losses, likelihoods and targets, and both are compared with the reference that unrolls the program
(tests/kron/unrolled.py). The verdicts for each parameter are:

- exact: the statistics equal the reference's to 1e-4.
- silent: it is a kernel but gets the statistics of single entries, without an error or a warning.
- wrong: the statistics are different, without an error or a warning.
- error: an error is raised.
"""

from __future__ import annotations

import functools
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import hadamard

from kronmesh import kron
from kronmesh.kron import observe
from kronmesh.train import kfac_jax_peer
from tests.draws import integers, normal
from tests.kron import unrolled
from tests.kron.gallery import GALLERY, Case

BEGIN, END = '<!-- peers -->', '<!-- end peers -->'
VERDICTS = ('exact', 'silent', 'wrong', 'error')
TOLERANCE = 1e-4

Verdicts = dict[str, tuple[str, str]]  # by parameter: the verdict, and why


# --- the same losses for both --------------------------------------------------------------------------------------


def drawn(outputs: jax.Array, likelihood: observe.Likelihood) -> jax.Array:
  """Returns fixed targets that the likelihood could have drawn."""
  if isinstance(likelihood, observe.Categorical):
    return integers(outputs.shape[-1], *outputs.shape[:-1], seed=11)
  if isinstance(likelihood, observe.Bernoulli):
    return integers(2, *outputs.shape, seed=11).astype(outputs.dtype)
  return normal(*outputs.shape, seed=11)


def log_loss(outputs: jax.Array, targets: jax.Array, likelihood: observe.Likelihood) -> jax.Array:
  """Returns -log p of each observation, up to a constant."""
  if isinstance(likelihood, observe.Categorical):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], -1)[..., 0]
  if isinstance(likelihood, observe.Bernoulli):
    each = jax.nn.softplus(outputs) - targets * outputs
  else:
    each = 0.5 * (outputs - targets) ** 2 / likelihood.variance
  return each.sum(tuple(range(each.ndim - likelihood.event_ndims, each.ndim)))


def with_targets(case: Case) -> Case:
  """Returns the case with one more argument: fixed targets for every mark in its loss, in order."""
  shapes = []
  visit = lambda outputs, likelihood: shapes.append((outputs, likelihood))  # noqa: E731
  jax.eval_shape(kfac_jax_peer.at_marks(case.loss, visit), case.params, *case.args)
  args = jax.tree.map(jnp.asarray, case.args)
  return case._replace(args=(*args, tuple(drawn(*shape) for shape in shapes)))


def of_marks(case: Case, register: bool = False) -> Callable:
  """Returns a function (params, *args, signs=None) -> the mean log loss of the outputs that the case's loss marks.

  The last of args are the targets. signs: factors on each example's share of the gradient.
  register: whether to register the likelihoods with kfac-jax.
  """

  def loss(params, *args, signs=None):
    *args, targets = args
    total, waiting = [], iter(targets)

    def visit(outputs, likelihood):
      if signs is not None:
        flip = signs.reshape(-1, *(1,) * (outputs.ndim - 1))
        outputs = flip * outputs + jax.lax.stop_gradient((1 - flip) * outputs)
      verdict = next(waiting)
      total.append(log_loss(outputs, verdict, likelihood).mean())
      if register:
        kfac_jax_peer.register(outputs, likelihood, verdict)

    kfac_jax_peer.at_marks(case.loss, visit)(params, *args)
    return sum(total)

  return loss


# --- ours ----------------------------------------------------------------------------------------------------------


class Ours:
  """The curvature that kron builds for a case, and the reference's statistics in its layouts."""

  def __init__(self, case: Case):
    self.case, self.loss = with_targets(case), of_marks(case)
    self.names = kron.param_names(case.params)
    self.leaves = jax.tree.leaves(case.params)
    self.refusal, self.curvature = None, None
    try:
      kron.curvature(case.loss, case.params, *case.args, fisher='empirical')  # its errors name the case's lines
      self.curvature = kron.curvature(self.loss, case.params, *self.case.args, fisher='empirical')
    except kron.CurvatureError as error:
      self.refusal = str(error).split(';')[0]

  @functools.cached_property
  def frozen(self) -> set[str]:
    """Returns the parameters without a gradient, which have no curvature."""
    grads = jax.tree.leaves(jax.jit(jax.grad(self.loss))(self.case.params, *self.case.args))
    return {name for name, g in zip(self.names, grads, strict=True) if not np.any(np.asarray(g))}

  @functools.cached_property
  def reference(self) -> tuple[unrolled.Unrolled, Any, Any]:
    case = self.case
    reference = unrolled.Unrolled(self.loss, case.params, case.args, case.examples, case.state)
    return reference, *reference.gradients()

  def kernel_of(self, name: str) -> Any:
    """Returns the block whose kernel holds the parameter, or None.

    If kronmesh refuses the program, it returns True for parameters of several axes.
    """
    if self.curvature is None:
      return self.leaves[self.names.index(name)].ndim > 1 or None
    for block in self.curvature.blocks:
      kernel = getattr(block.operator, 'kernel', None)
      if kernel is not None and name in block.params[: len(kernel.params)]:
        return block
    return None

  def verdicts(self) -> Verdicts:
    if self.curvature is None:
      return {name: ('error', self.refusal) for name in self.names}
    case = self.case
    errors = unrolled.errors(self.curvature, self.loss, case.params, case.args, case.examples, case.state)
    verdicts: Verdicts = {}
    for block in self.curvature.blocks:
      worst = max(error for (name, _), error in errors.items() if name == block.name)
      verdicts |= {name: ('exact' if worst < TOLERANCE else 'wrong', f'{worst:.0e}') for name in block.params}
    # A parameter without a block keeps its plain gradient.
    return {name: verdicts.get(name, ('silent', 'no block')) for name in self.names}


# --- kfac-jax ------------------------------------------------------------------------------------------------------


class Theirs:
  """The blocks that kfac-jax registers for a case by itself, and its statistics after one update."""

  def __init__(self, ours: Ours):
    import kfac_jax

    self.package, self.ours, self.case = kfac_jax, ours, ours.case
    self.loss = of_marks(ours.case, register=True)
    self.signs = hadamard(ours.case.examples + 1)[:, 1:].astype(np.float32)  # columns are orthogonal
    self.estimator, update = self.estimate()
    self.states = update(None)
    self.blocks = list(zip(self.estimator.blocks, self.estimator.jaxpr.layer_indices, strict=True))

  def estimate(self, signs: Any = None) -> tuple[Any, Callable]:
    """Returns an estimator, and a function signs -> its statistics after one update. signs: an example of signs."""
    estimator = self.package.BlockDiagonalCurvature(
      func=lambda params, batch: self.loss(params, *batch[0], signs=batch[1]),
      default_estimation_mode='fisher_empirical',
      params_index=0,
      batch_index=1,
    )
    key, case = jax.random.key(0), self.case
    start = estimator.init(key, (case.params, (case.args, signs)), None, None, False)

    @jax.jit
    def update(params, args, signs):
      given = {'func_args': (params, (args, signs)), 'batch_size': case.examples, 'rng': key}
      return estimator.update_curvature_matrix_estimate(
        start, ema_old=0.0, ema_new=1.0, identity_weight=0.0, **given
      ).blocks_states

    return estimator, functools.partial(update, case.params, case.args)

  @functools.cached_property
  def averaged(self) -> list[Any]:
    """Returns the statistics, averaged over signs of the examples.

    The average turns a squared sum of gradients into the sum of their squares.
    """
    _, update = self.estimate(jnp.asarray(self.signs[0]))
    updates = [update(jnp.asarray(signs)) for signs in self.signs]
    return jax.tree.map(lambda *x: sum(x) / len(x), *updates)

  @functools.cached_property
  def diagonal(self) -> list[np.ndarray]:
    """Returns the sums of the examples' squared gradients of the mean loss."""
    grad = jax.jit(jax.grad(lambda params, signs: self.ours.loss(params, *self.case.args, signs=signs)))
    squares = [
      [np.asarray(g, np.float64) ** 2 for g in jax.tree.leaves(grad(self.case.params, jnp.asarray(s)))]
      for s in self.signs
    ]
    return [sum(column) / len(self.signs) for column in zip(*squares, strict=True)]

  def verdicts(self) -> Verdicts:
    verdicts: Verdicts = {}
    for number, (block, indices) in enumerate(self.blocks):
      kind = type(block).__name__
      if isinstance(block, self.package.KroneckerFactored):
        error, why = self.kronecker(number)
        verdict = ('exact' if error < TOLERANCE else 'wrong', why)
        verdicts |= {self.ours.names[i]: verdict for i in indices}
        continue
      for position, i in enumerate(indices):
        name = self.ours.names[i]
        if self.ours.kernel_of(name) is not None:
          verdicts[name] = ('silent', kind)
          continue
        states = self.averaged if 'Naive' in kind else self.states
        diagonal = np.asarray(states[number].diagonal_factors[position].value, np.float64)
        error = min(unrolled.relative(diagonal, self.diagonal[i]), self.unit_error(name, diagonal))
        verdicts[name] = ('exact' if error < TOLERANCE else 'wrong', f'{kind} {error:.1e}')
    return verdicts

  def unit_error(self, name: str, diagonal: np.ndarray) -> float:
    """Returns the relative error of a free parameter's diagonal against the reference, or inf without a block for it.

    The reference's blocks come from the examples' copies of the parameter, and `self.diagonal` comes from their losses.
    The two differ under a batch norm, which mixes examples. Either counts as exact.
    """
    blocks = self.ours.curvature.blocks if self.ours.curvature else ()
    for block in blocks:
      if name in block.params and hasattr(block.operator, 'layouts'):
        reference, block, _, each = self.reference_of(block)
        column = block.params.index(name)
        expected = unrolled.unit(reference, block, each)[:, column, column] / self.case.examples**2
        diagonal_read = np.asarray(block.operator.layouts[column].apply(jnp.asarray(diagonal))).reshape(-1)
        return unrolled.relative(diagonal_read, expected)
    return np.inf

  def kronecker(self, number: int) -> tuple[float, str]:
    """Returns the largest relative error of a block's two factors and its scale, and says which are off."""
    block, indices = self.blocks[number]
    state = self.states[number]
    kind = type(block).__name__
    names = [self.ours.names[i] for i in indices]
    kernels = [(name, self.ours.kernel_of(name)) for name in names]
    kernels = [(name, matrix) for name, matrix in kernels if matrix is not None]
    if len(kernels) != 1 or kernels[0][1] is True:
      return np.inf, f'{kind} for what is not one kernel'
    (name, matrix), reference = kernels[0], self.ours.reference[0]
    kernel = reference.names.index(name)
    order = [reference.names.index(p) for p in matrix.params[: len(matrix.operator.kernel.params)]]
    numbered = np.asarray(matrix.operator.kernel.apply(*(reference.ids[p] for p in order)))
    place = {int(n): position for position, n in np.ndenumerate(numbered)}
    theirs = np.asarray(block.parameters_shaped_list_to_array([reference.ids[i] for i in indices]))
    members = set(np.asarray(reference.ids[kernel], np.int64).reshape(-1).tolist())
    rows = [r for r in range(theirs.shape[0]) if int(theirs[r, 0]) in members]
    s, i, o = np.moveaxis(np.array([[place[int(n)] for n in theirs[r]] for r in rows]), -1, 0)
    if np.ptp(s):
      return np.inf, f'{kind} over several kernels'
    across = np.ptp(i, 1).max() == 0 and np.ptp(o, 0).max() == 0
    if not across and not (np.ptp(i, 0).max() == 0 and np.ptp(o, 1).max() == 0):
      return np.inf, f'{kind} along other axes than the kernel has'
    slot, first = s[0, 0], (i if across else o)[:, 0]
    second = (o if across else i)[0]
    factors = [np.asarray(f.value, np.float64) for f in state.factors]
    factors[0] = factors[0][np.ix_(rows, rows)]
    scale = float(block.scale(state, use_cache=False))
    worst = []
    for active in (False, True):  # padded or unused entries may be left out
      sums, uses = unrolled.kronecker(*self.reference_of(matrix), active=active)
      a, g = sums['A'][slot], sums['G'][slot]
      expected = [m[np.ix_(at, at)] for m, at in zip((a, g) if across else (g, a), (first, second), strict=True)]
      n = self.case.examples
      size = np.prod([np.linalg.norm(m) for m in expected]) / (n**2 * max(uses['A'], 1))
      errors = {
        f'{side}': unrolled.relative(m / max(np.linalg.norm(m), 1e-30), e / max(np.linalg.norm(e), 1e-30))
        for side, m, e in zip('AG' if across else 'GA', factors, expected, strict=True)
      }
      errors['scale'] = abs(scale * np.prod([np.linalg.norm(m) for m in factors]) / size - 1)
      off = ', '.join(f'{side} off by {error:.2g}' for side, error in errors.items() if error >= TOLERANCE)
      worst.append((max(errors.values()), f'{kind}: {off}'))
    return min(worst)

  def reference_of(self, block: Any) -> tuple[Any, Any, Any, Any]:
    reference, dy, each = self.ours.reference
    return reference, block, dy, each


def theirs(ours: Ours) -> Verdicts:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # from JAX
      return Theirs(ours).verdicts()
  except Exception as error:
    return dict.fromkeys(ours.names, ('error', reason(error)))


def reason(error: Exception) -> str:
  """Formats an error in one line, with the last kfac-jax line in its traceback and what an assertion asserts."""
  frames = [frame for frame in traceback.extract_tb(error.__traceback__) if 'kfac_jax' in Path(frame.filename).parts]
  at = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
  words = next((line for line in str(error).splitlines() if line.strip()), at.line or '')
  words = words.partition('  # ')[0].strip().removeprefix('assert ')
  return f'{type(error).__name__}: {words[:100]} ({Path(at.filename).name}:{at.lineno})'


# --- the table -----------------------------------------------------------------------------------------------------


def look_at(case: Case) -> tuple[Verdicts, Verdicts, int]:
  """Returns the verdicts on kronmesh and kfac-jax, and the number of frozen parameters, which neither includes."""
  ours = Ours(case)
  both = [ours.verdicts(), theirs(ours)]
  return *({k: v for k, v in side.items() if k not in ours.frozen} for side in both), len(ours.frozen)


def row(name: str, ours: Verdicts, other: Verdicts, frozen: int) -> str:
  """Formats an architecture's line: the counts of each verdict for kronmesh and kfac-jax, and the reasons."""
  counts = [str(sum(verdict == v for verdict, _ in side.values())) for side in (ours, other) for v in VERDICTS]
  refused = [f'kronmesh: {why}' for verdict, why in ours.values() if verdict in ('wrong', 'error')]
  words = [why for verdict, why in other.values() if verdict in ('wrong', 'error')]
  words = list(dict.fromkeys(refused + words))
  name = f'{name} ({frozen} frozen)' if frozen else name
  return f'| {name} | {" | ".join(counts)} | {"; ".join(words).replace("|", "/")} |'


def table(rows: dict[str, str]) -> list[str]:
  """Returns the table's lines, with the sums over all architectures at the end."""
  head = ('architecture', *(f'{who} {v}' for who in ('kronmesh', 'kfac-jax') for v in VERDICTS), 'why')
  counts = [[int(cell) for cell in line.split(' | ')[1:9]] for line in rows.values()]
  sums = ' | '.join(str(sum(column)) for column in zip(*counts, strict=True))
  return [f'| {" | ".join(head)} |', f'|---{"|--:" * 8}|---|', *rows.values(), f'| all | {sums} | |']


def rows_of(page: str) -> dict[str, str]:
  """Returns the rows that a page already has, by architecture."""
  lines = page.split(BEGIN)[1].split(END)[0].splitlines()
  return {
    name: line for name in GALLERY for line in lines if re.match(rf'\| {re.escape(name)}( \(\d+ frozen\))? \|', line)
  }

"""Compares kron's statistics of a random program with the reference, and optimisers' first updates with dense solves."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kronmesh import kron
from tests.kron.random_programs import generate
from tests.kron.random_reference import Coupled, Measured, expected, layout_ids
from tests.kron.random_trees import TREES
from tests.kron.reference import in_shards

TOLERANCE = 1e-5
DAMPING = 0.01


class Outcome(NamedTuple):
  """status: 'exact', 'refused', 'wrong' or 'error'. error: the largest, relative to the largest entry of its block."""

  seed: int
  kinds: tuple[str, ...]
  fisher: str
  status: str
  detail: str
  error: float


class Wrong(Exception):
  pass


def check(seed, optimizers=True):
  """The outcome of one program. Where the exact Fisher is known in expectation only, the empirical one is checked."""
  program = generate(seed)
  try:
    measured = Measured(program, program.fisher)
    for use in measured.uses:
      measured.outer(use)
  except Coupled:
    program = generate(seed, 'empirical')
    measured = Measured(program, 'empirical')
  return outcome(program, lambda: compare(program, measured, optimizers))


def outcome(program, compare):
  try:
    worst, status, detail = compare(), 'exact', ''
  except kron.CurvatureError as error:
    worst, status, detail = 0.0, 'refused', str(error)
  except Wrong as error:
    worst, status, detail = float('nan'), 'wrong', str(error)
  except Exception as error:
    worst, status, detail = float('nan'), 'error', f'{type(error).__name__}: {str(error)[:300]}'
  return Outcome(program.seed, tuple(program.kinds), program.fisher, status, detail, worst)


def shortened(message):
  """A refusal without names, numbers and lines, so that equal ones are counted together."""
  message = re.sub(r"'[^']*'", "'...'", message)
  message = re.sub(r' at [^ ,;]*:\d+', '', message)
  return re.sub(r'\d+', 'N', message)[:150]


def compare(program, measured, optimizers=True):
  """The largest error of all blocks; raises where one is too large."""
  params, args = program.wrapped(), tuple(jnp.asarray(a) for a in program.args)
  curvature = kron.curvature(program.loss(), params, *args, fisher=program.fisher)
  value, grads, stats = jax.jit(curvature.value_and_grad)(params, *args)
  plain = jax.jit(jax.value_and_grad(program.loss(marked=False)))(params, *args)
  for name, a, b in zip(
    ['value', *kron.param_names(params)], [value, *jax.tree.leaves(grads)], jax.tree.leaves(plain), strict=True
  ):
    near(f'value or gradient of {name}', a, b, 1e-11)
  worst = covered(curvature, measured, program, params)
  for block in curvature.blocks:
    worst = max(worst, block_error(block, stats, measured, params))
  if program.seed % 4 == 2:
    check_shards(program, measured, params, args)
  if optimizers:
    check_optimizers(curvature, program, params, args, grads, stats)
  return worst


def check_shards(program, measured, params, args):
  """The same means from statistics that are kept apart for two shards of the batch."""
  try:
    curvature = kron.curvature(program.loss(), params, *args, fisher=program.fisher, placement=in_shards(2))
  except kron.CurvatureError:
    return
  stats = jax.jit(curvature.value_and_grad)(params, *args)[2]
  for block in curvature.blocks:
    block_error(block, stats, measured, params, 'in two shards: ')


def near(what, found, right, tolerance=TOLERANCE, scale=None):
  found, right = np.asarray(found, np.float64), np.asarray(right, np.float64)
  if found.shape != right.shape:
    raise Wrong(f'{what}: shape {found.shape}, right is {right.shape}')
  error = np.abs(found - right).max(initial=0) / max(np.abs(right).max(initial=0) if scale is None else scale, 1e-12)
  if not error < tolerance:
    raise Wrong(f'{what}: off by {error:.2g}, norm {np.linalg.norm(found):.6g} for {np.linalg.norm(right):.6g}')
  return float(error)


def covered(curvature, measured, program, params):
  """Every entry of a parameter that has a gradient through a mark lies in a block."""
  names = kron.param_names(params)
  ids = dict(zip(names, program.wrapped_ids(measured.ids), strict=True))
  held = set()
  for block in curvature.blocks:
    held |= {int(n) for name in block.params for n in ids[name].flat}
  for use in measured.uses:
    missing = [int(n) for n in use.ids.flat if int(n) not in held]
    if missing and np.abs(measured.outer(use)).max() > 0:
      name = next(name for name, own in ids.items() if missing[0] in own)
      raise Wrong(f'{name!r} has no block and was not refused ({curvature.gradient_only.get(name)})')
  return 0.0


def block_error(block, stats, measured, params, where=''):
  right = expected(measured, block, kron.param_names(params))
  found, worst = {k: np.asarray(s) for k, s in stats.means(block.name).items()}, 0.0
  for name, m in sorted(found.items(), key=lambda item: item[0].startswith('A')):
    e = right[name]
    factor = block.operator.factors['A' if name in ('A', "G'") else 'G'] if 'A' in block.operator.factors else None
    if factor is not None and factor.n == 1 and factor.size > 1:
      m, e = m.reshape(e.shape[:2]), np.diagonal(e, axis1=1, axis2=2)
    if name in ('A', "A'"):  # a slot that was not used says nothing
      there = right['uses ' + name] > 0
      m, e = m[there], e[there]
    worst = max(worst, near(f'{where}{block.name} {name}', m, e))
    if name in ('A', "A'"):
      count = np.asarray(stats.uses[block.name][name]).reshape(-1)
      count = np.repeat(count, len(there) // count.size)  # a number for each iteration of the loops that slice a kernel
      near(f'{where}uses of {block.name} ({name})', count, right['uses ' + name])
  return worst


# --- optimisers


def check_optimizers(curvature, program, params, args, grads, stats):
  """One update of `scale_by_kfac`, and in every other program one of another optimiser."""
  own = dict(zip(kron.param_names(params), jax.tree.leaves(grads), strict=True))
  means = {b.name: {k: np.asarray(s) for k, s in stats.means(b.name).items()} for b in curvature.blocks}
  right = dense_updates(curvature, own, means, kfac_solve)

  def first(tx):
    return jax.jit(lambda grads, params, stats: tx.update(grads, tx.init(params), params, stats=stats)[0])(
      grads, params, stats
    )

  updated('scale_by_kfac', first(kron.scale_by_kfac(curvature, damping=DAMPING)), right)
  if program.seed % 4 == 1:
    check_other_clothes(curvature, program, params, grads, stats, right)
  which = program.seed % 6
  if which == 0:
    updated('scale_by_stale_kfac', first(kron.scale_by_stale_kfac(curvature, damping=DAMPING)), right)
  elif which == 2:
    tx = kron.scale_by_ekfac(curvature, damping=DAMPING)

    def step(params, *args):
      state = tx.init(params)
      _, grads, stats = curvature.value_and_grad(params, *args, basis=kron.basis(state, curvature))
      return tx.update(grads, state, params, stats=stats)[0]

    updated('scale_by_ekfac', jax.jit(step)(params, *args), dense_updates(curvature, own, means, ekfac_solve))
  elif which == 4:
    updates = first(kron.scale_by_kfac_adam(curvature))
    for name, u, g in zip(own, jax.tree.leaves(updates), own.values(), strict=True):
      if not np.isfinite(u).all() or (np.abs(g).max() > 0 and np.abs(u - g).max() == 0):
        raise Wrong(f'scale_by_kfac_adam leaves {name!r} as it is, or makes it infinite')


def check_other_clothes(curvature, program, params, grads, stats, right):
  """The same update where the optimiser sees the same parameters in another tree, or a refusal."""
  names = sorted(set(TREES) - {program.tree})
  wrap = TREES[names[program.seed // 4 % len(names)]][0]
  if program.seed % 3 == 0:
    wrap = lambda tree: {'params': tree}  # noqa: E731
  unwrap = TREES[program.tree][1]
  other = lambda tree: wrap(unwrap(tree))  # noqa: E731
  tx = kron.scale_by_kfac(curvature, damping=DAMPING)
  try:
    updates = jax.jit(tx.update)(other(grads), tx.init(other(params)), other(params), stats=stats)[0]
  except kron.CurvatureError:
    return
  right = other(jax.tree.unflatten(jax.tree.structure(grads), list(right.values())))
  for k, (u, e) in enumerate(zip(jax.tree.leaves(updates), jax.tree.leaves(right), strict=True)):
    near(f'scale_by_kfac of the same parameters in another tree, leaf {k}', u, e, 1e-6)


def updated(optimizer, updates, right):
  for name, u, e in zip(right, jax.tree.leaves(updates), right.values(), strict=True):
    near(f'{optimizer} of {name}', u, e, 1e-6)


def dense_updates(curvature, grads, means, solve):
  """The update of every parameter by numpy; what has no block keeps its gradient."""
  start, ids = 0, {}
  for name, g in grads.items():
    ids[name] = np.arange(start, start + g.size).reshape(g.shape)
    start += g.size
  flat = np.concatenate([np.asarray(g).reshape(-1) for g in grads.values()])
  result = flat.copy()
  for block in curvature.blocks:
    at = places(block.operator, [ids[name] for name in block.params])
    result[at] = solve(block.operator, flat[at], means[block.name])
  return {name: result[own] for name, own in ids.items()}


def places(operator, ids):
  """The entries of a block: (slots, inputs, outputs) of a kernel, (channels, parameters) of others."""
  if hasattr(operator, 'layouts'):
    columns, rest = [], ids
    for layout in operator.layouts:
      columns.append(layout_ids(layout, rest[: len(layout.params)]).reshape(-1))
      rest = rest[len(layout.params) :]
    return np.stack(columns, -1)
  n = len(operator.kernel.params)
  at = layout_ids(operator.kernel, ids[:n])
  return at if operator.bias is None else np.concatenate([at, layout_ids(operator.bias, ids[n:])[:, None]], 1)


def two_factors(operator, means):
  """A and G as whole matrices; of a kernel that is used transposed too, the product with the same partial traces."""
  whole = lambda m, n: np.stack([np.diag(x) for x in m.reshape(-1, n)]) if m.shape[-1] == 1 < n else m  # noqa: E731
  a, g = (whole(means[k], operator.factors[k].size) for k in 'AG')
  if "A'" not in means:
    return a, g
  back_a, back_g = whole(means["A'"], g.shape[-1]), whole(means["G'"], a.shape[-1])
  tr = lambda m: np.trace(m, axis1=1, axis2=2)[:, None, None]  # noqa: E731
  root = np.sqrt(tr(a) * tr(g) + tr(back_a) * tr(back_g))
  root = np.where(root > 0, root, 1)
  return (tr(g) * a + tr(back_a) * back_g) / root, (tr(a) * g + tr(back_g) * back_a) / root


def kfac_solve(operator, matrices, means):
  if hasattr(operator, 'layouts'):
    eye = np.eye(matrices.shape[-1])
    return np.stack([np.linalg.solve(f + DAMPING * eye, x) for f, x in zip(means['F'], matrices, strict=True)])
  result = []
  for a, g, v in zip(*two_factors(operator, means), matrices, strict=True):
    own, other = np.trace(a) / len(a), np.trace(g) / len(g)
    pi = np.sqrt(own / other) if own > 0 and other > 0 else 1.0
    left = a + pi * np.sqrt(DAMPING) * np.eye(len(a))
    right = g + np.sqrt(DAMPING) / pi * np.eye(len(g))
    result.append(np.linalg.solve(left, v) @ np.linalg.inv(right))
  return np.stack(result)


def ekfac_solve(operator, matrices, means):
  if hasattr(operator, 'layouts'):
    return kfac_solve(operator, matrices, means)
  result = []
  for a, g, v in zip(*two_factors(operator, means), matrices, strict=True):
    (x, ua), (y, ug) = np.linalg.eigh(a), np.linalg.eigh(g)
    s = np.maximum(x, 0)[:, None] * np.maximum(y, 0)
    result.append(ua @ ((ua.T @ v @ ug) / (s + DAMPING)) @ ug.T)
  return np.stack(result)

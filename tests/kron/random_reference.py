"""The statistics of a random program by their definition, from jacobians of its marks with respect to offsets."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.kron.random_contexts import Linear, Param, Reference


class Coupled(Exception):
  """A use's gradient depends on several observations, which the exact Fisher knows in expectation only."""


class Measured:
  """The uses of a program, each with its rows and the sum over observations of its gradients' outer products."""

  def __init__(self, program, fisher):
    self.program, self.fisher = program, fisher
    leaves, self.treedef = jax.tree.flatten(program.params)
    self.ids, start = [], 1
    for leaf in leaves:
      self.ids.append(np.arange(start, start + leaf.size).reshape(leaf.shape))
      start += leaf.size
    self.leaves = leaves
    shapes = self._shapes()
    offsets = [jnp.zeros(s) for s in shapes]
    run = jax.jit(self._exact if fisher == 'exact' else self._empirical)
    gradients, (rows, columns, wheres, observed) = jax.device_get(run(leaves, offsets))
    self.uses = [
      use._replace(rows=r, columns=c, where=w) if isinstance(use, Linear) else use
      for use, r, c, w in zip(self.uses, rows, columns, wheres, strict=True)
    ]
    self.gradients, self.groups = gradients, self._groups(observed) if fisher == 'exact' else None

  def _shapes(self):
    found = []

    def discover(leaves):
      ctx = Reference()
      self.program.run(ctx, self._params(leaves), self.program.args)
      found.extend(ctx.shapes)
      return 0

    jax.eval_shape(discover, self.leaves)
    return found

  def _params(self, leaves):
    return self.treedef.unflatten([Param(x, ids) for x, ids in zip(leaves, self.ids, strict=True)])

  def _run(self, leaves, offsets, scaled):
    ctx = Reference(offsets, scaled)
    loss = self.program.run(ctx, self._params(leaves), self.program.args)
    self.uses, self.observed = ctx.uses, ctx.observed
    linear = [use if isinstance(use, Linear) else None for use in ctx.uses]
    pick = lambda name: [None if use is None else getattr(use, name) for use in linear]  # noqa: E731
    return loss, (pick('rows'), pick('columns'), pick('where'), [(o.z, o.weight) for o in ctx.observed])

  def _empirical(self, leaves, offsets):
    return jax.grad(lambda o: self._run(leaves, o, True), has_aux=True)(offsets)

  def _exact(self, leaves, offsets):
    """The jacobian of all marks' entries, one after another."""

    def outputs(offsets):
      _, aux = self._run(leaves, offsets, False)
      return jnp.concatenate([z.reshape(-1) for z, _ in aux[3]]), aux

    z, pull, aux = jax.vjp(outputs, offsets, has_aux=True)
    return jax.vmap(lambda c: pull(c)[0])(jnp.eye(z.size)), aux

  def _groups(self, observed):
    """Where each observed array lies among the jacobians, with its observations' Fisher information and weights."""
    at, groups = 0, []
    for o, (z, weight) in zip(self.observed, observed, strict=True):
      mark = self.program.marks[o.mark]
      size = int(np.prod(z.shape[z.ndim - mark.event_ndims :]))
      fishers = np.stack([fisher_of(mark, row) for row in z.reshape(-1, size)])
      groups.append((o.mark, at, size, fishers, weight.reshape(-1) / mark.count))
      at += z.size
    return groups

  def outer(self, *uses):
    """The outer products of each use's gradients, (slots, uses, outputs, outputs); several uses are taken together."""
    if self.fisher != 'exact':
      g = np.concatenate([rows_of(use, self.gradients[use.offset]) for use in uses], -1)
      return np.einsum('sri,srj->srij', g, g)
    total, seen = 0, {}
    for mark, at, size, fishers, weights in self.groups:
      for o, weight in enumerate(weights):
        if not weight:
          continue
        entries = range(at + o * size, at + (o + 1) * size)
        g = np.stack([np.concatenate([rows_of(u, self.gradients[u.offset][k]) for u in uses], -1) for k in entries])
        touched = np.abs(g).max((0, -1)) > 0
        if np.any(seen.get(mark, False) & touched):
          raise Coupled
        seen[mark] = seen.get(mark, False) | touched
        total = total + weight * np.einsum('csri,cd,dsrj->srij', g, fishers[o], g)
    return total


def rows_of(use, gradient):
  """Gradients as (slots, uses, outputs); of a free parameter as (1, examples, entries)."""
  if isinstance(use, Linear):
    g = np.asarray(use.arrange(gradient))
    return g if use.columns is None else g * use.columns[:, None]
  if use.axis is None:
    return gradient.reshape(1, 1, -1)
  return np.moveaxis(gradient, use.axis, 0).reshape(1, gradient.shape[use.axis], -1)


def fisher_of(mark, z):
  """The Fisher information of one observation's outputs, or its loss's Hessian."""
  if mark.kind == 'categorical':
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return np.diag(p) - np.outer(p, p)
  if mark.kind == 'gaussian':
    return np.eye(len(z)) / mark.variance
  p = 1 / (1 + np.exp(-z))
  return np.diag(p * (1 - p)) + (1.0 if mark.kind == 'loss' else 0.0)


# --- a block's statistics from the uses


def expected(measured, block, names):
  """The means that a block's statistics should have, by name; counts of uses under 'uses A'."""
  ids = dict(zip(names, measured.program.wrapped_ids(measured.ids), strict=True))
  operator, own = block.operator, [ids[name] for name in block.params]
  if hasattr(operator, 'layouts'):
    return {'F': _unit(measured, operator, own)}
  return _kernel(measured, operator, own)


def layout_ids(layout, ids):
  with jax.ensure_compile_time_eval():
    return np.asarray(layout.apply(*(jnp.asarray(x) for x in ids)))


def _unit(measured, operator, own):
  columns, rest = [], list(own)
  for layout in operator.layouts:
    columns.append(layout_ids(layout, rest[: len(layout.params)]).reshape(-1))
    rest = rest[len(layout.params) :]
  place = {int(n): (c, k) for k, column in enumerate(columns) for c, n in enumerate(column)}
  total = np.zeros((len(columns[0]), len(columns), len(columns)))
  uses = [(k, u) for k, u in enumerate(measured.uses) if not isinstance(u, Linear) and int(u.ids[0]) in place]
  column = lambda use: place[int(use.ids[0])][1]  # noqa: E731
  while uses:
    (k, first), *uses = uses
    pair = [first]
    if column(first) == 0 and uses and uses[0][0] == k + 1 and column(uses[0][1]) == 1:
      pair.append(uses.pop(0)[1])  # the shift that is added to the scale's result
    joined = measured.outer(*pair).sum((0, 1))
    at = [place[int(n)] for use in pair for n in use.ids]
    for a, (c, i) in enumerate(at):
      for b, (d, j) in enumerate(at):
        if c == d:
          total[c, i, j] += joined[a, b]
  return total


def _kernel(measured, operator, own):
  n = len(operator.kernel.params)
  kernel = layout_ids(operator.kernel, own[:n])
  place = {int(number): at for at, number in np.ndenumerate(kernel)}
  slots, n_in, n_out = kernel.shape
  bias = None if operator.bias is None else layout_ids(operator.bias, own[n:])
  wide = n_in + (bias is not None)
  sums = {'A': np.zeros((slots, wide, wide)), 'G': np.zeros((slots, n_out, n_out))}
  sums |= {"A'": np.zeros((slots, n_out, n_out)), "G'": np.zeros((slots, wide, wide))}
  uses = {'A': np.zeros(slots), "A'": np.zeros(slots)}
  for use in measured.uses:
    if not isinstance(use, Linear) or int(use.ids.flat[0]) not in place:
      continue
    at = np.array([place[int(number)] for number in use.ids.flat]).reshape(*use.ids.shape, 3)
    s, along, across, transposed = _axes(at)
    outer = measured.outer(use)
    table = operator.factors['A'].n == 1 < operator.factors['A'].size
    everywhere = use.where is None or (use.one_hot and not table)
    where = np.ones(use.rows.shape[:2]) if everywhere else np.asarray(use.where, np.float64)
    for slot, target in enumerate(s):
      a, keep = use.rows[slot], where[slot]
      big = np.zeros((len(a), n_out if transposed else wide))
      big[:, along] = a
      if bias is not None and use.bias is not None and not transposed:
        assert (bias[target][across] == use.bias[slot]).all(), 'the bias of another kernel'
        big[:, -1] = 1
      names = ("A'", "G'") if transposed else ('A', 'G')
      sums[names[0]][target] += np.einsum('r,ri,rj->ij', keep, big, big)
      uses[names[0]][target] += keep.sum()
      g = np.einsum('r,rij->ij', keep, outer[slot])
      sums[names[1]][target][np.ix_(across, across)] += g
  for name, count in uses.items():
    sums[name] /= np.where(count > 0, count, 1)[:, None, None]
  return {**sums, **{'uses ' + name: count for name, count in uses.items()}}


def _axes(at):
  """Where the axes of a use's kernel lie in the block's: slots, inputs, outputs; and whether it is used transposed."""
  s, along, across = at[:, 0, 0, 0], at[0, :, 0, 1], at[0, 0, :, 2]
  plainly = np.array(np.meshgrid(s, along, across, indexing='ij')).transpose(1, 2, 3, 0)
  if (plainly == at).all():
    return s, along, across, False
  along, across = at[0, :, 0, 2], at[0, 0, :, 1]
  flipped = np.array(np.meshgrid(s, across, along, indexing='ij')).transpose(1, 3, 2, 0)
  assert (flipped == at).all(), 'the block is not a product of the inputs and outputs of a use'
  return s, along, across, True

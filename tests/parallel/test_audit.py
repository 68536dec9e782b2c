"""The audit finds what was planted, with its bytes, axes, line and count; golden tables of what programs communicate."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kronmesh import kron, parallel
from kronmesh.parallel import assert_bytes, assert_no_gather, audit, make_mesh, written
from kronmesh.parallel.audit import _axes, _first_group
from tests.parallel import planted
from tests.parallel.problems import arguments, compiled, problems

P = PartitionSpec
GOLDEN = Path(__file__).parent / 'golden.json'


@pytest.fixture(scope='module')
def mesh():
  return make_mesh('data=4,model=2')


def on(mesh, shape, *spec, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize(
  'spec, axes, size', [(('data',), 'data', 4), (('model',), 'model', 2), ((('data', 'model'),), 'data,model', 8)]
)
def test_a_planted_gather_is_found(mesh, spec, axes, size):
  found = audit(jax.jit(lambda x: planted.gathered(x, mesh)), on(mesh, (64, 48), *spec), mesh=mesh)
  (gather,) = found.select('all-gather')
  assert (gather.bytes, gather.axes, gather.count, gather.group) == (64 * 48 * 4, axes, 1, size)
  assert gather.source == f'parallel/planted.py:{planted.line_of("planted")}'
  assert gather.sent == 64 * 48 * 4 * (size - 1) / size
  with pytest.raises(
    parallel.AuditError, match=r'1 gathers of more than 0 bytes: all-gather over .*12288 bytes.*planted.py'
  ):
    assert_no_gather(found)
  assert_no_gather(found, larger_than=64 * 48 * 4)
  with pytest.raises(parallel.AuditError, match='12288 bytes where 12000 bytes are allowed'):
    assert_bytes(found, 12000)
  assert_bytes(found, 12288, 'all-gather', axes.split(',')[0])
  assert 'planted.py' in str(found) and found.summary() == {f'all-gather over {axes}': (1, 12288)}


def test_a_gathered_argument_is_named(mesh):
  found = audit(jax.jit(lambda weights: planted.whole(weights, mesh)), on(mesh, (64, 8), 'data'), mesh=mesh)
  (gather,) = found
  assert 'planted.py' in gather.source or gather.source == 'argument weights'


def test_loops_count_by_their_trips(mesh):
  found = audit(jax.jit(lambda x: planted.gathered_in_a_loop(x, mesh)), on(mesh, (4, 32), None, 'model'), mesh=mesh)
  (gather,) = [c for c in found.select('all-gather') if c.count > 1]
  assert (gather.count, gather.bytes, gather.total) == (5, 32 * 4, 5 * 32 * 4)
  assert gather.source == f'parallel/planted.py:{planted.line_of("planted in a loop")}'


def test_a_loop_of_unknown_length_is_said(mesh):
  def until(x):
    step = lambda x: planted.whole(jnp.sin(x * x.sum()), mesh)  # noqa: E731
    return jax.lax.while_loop(lambda x: x.sum() > 1e-3, step, x)

  found = audit(jax.jit(until), on(mesh, (32,), 'data'), mesh=mesh)
  assert any(not c.exact for c in found)
  with pytest.raises(parallel.AuditError, match='loops of unknown length'):
    assert_bytes(found, 10**9)


def test_every_kind(mesh):
  def local(x):
    y = jax.lax.psum_scatter(x, ('data', 'model'), tiled=True)
    z = jax.lax.all_gather(y, 'model', tiled=True)
    z = jax.lax.ppermute(z, 'data', [(i, (i + 1) % 4) for i in range(4)])
    return jax.lax.psum(x, 'data'), z + jax.lax.all_to_all(z, 'model', 0, 0, tiled=True)

  fn = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=(P(), P('data')), check_vma=False)
  x = on(mesh, (16, 32))
  size = 16 * 32 * 4
  expected = {
    'all-reduce over data': (1, size),
    'all-gather over model': (1, size // 4),
    'reduce-scatter over data,model': (1, size),
    'collective-permute over data': (1, size // 4),
    'all-to-all over model': (1, size // 4),
  }
  assert audit(jax.jit(fn), x, mesh=mesh).summary() == dict(sorted(expected.items()))
  assert written(fn, jnp.ones((16, 32)), mesh=mesh).summary() == dict(sorted(expected.items()))
  with pytest.raises(ValueError, match="kind='gather' is unknown"):
    audit(jax.jit(fn), x, mesh=mesh).select('gather')


@pytest.mark.parametrize(
  'text, group',
  [
    ('replica_groups={{0,1},{2,3}}, x', [0, 1]),
    ('replica_groups={}, x', list(range(8))),
    ('replica_groups=[4,2]<=[8], x', [0, 1]),
    ('replica_groups=[2,4]<=[4,2]T(1,0), x', [0, 2, 4, 6]),
    ("replica_groups=mesh['data'=4,'model'=2] {'model'}, x", [0, 1]),
    ("replica_groups=mesh['data'=4,'model'=2] {'data'}, x", [0, 2, 4, 6]),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, x", [0, 1]),
    ("replica_groups=mesh['a'=8] {'a':(1)2}, x", [0, 4]),
    ("replica_groups=mesh['a'=8] {'a':(4)2}, x", [0, 1]),
  ],
)
def test_replica_groups_in_every_spelling(text, group):
  assert _first_group(text, 8) == group


def test_a_part_of_an_axis_has_a_name_of_its_own():
  assert _axes([0, 4], make_mesh('data=8')) == 'data/2'
  assert _axes([0, 1], make_mesh('data=4,model=2')) == 'model'


# --- what K-FAC communicates


def first_order(c):
  """The same step by SGD with momentum."""
  tx = optax.sgd(0.1, momentum=0.9)

  def step(carry, batch):
    params, state, opt_state = carry
    (loss, state), grads, _ = c.curvature.value_and_grad(params, state, *batch, statistics=False)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), state, opt_state), loss, grads

  (params, state, _), batch = arguments(c)
  of_params = c.shardings[0]
  opt_state = jax.eval_shape(tx.init, params)
  shardings = parallel.state_shardings(opt_state, of_params, c.mesh)
  opt_state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), opt_state, shardings)
  whole = NamedSharding(c.mesh, P())
  out = (of_params, c.shardings[1], shardings), whole, of_params
  return audit(jax.jit(step, out_shardings=out), (params, state, opt_state), batch, mesh=c.mesh)


def case(model, spec, **settings):
  mesh = make_mesh(spec)
  return compiled(problems(jnp.float32)[model], mesh, placement=parallel.Placement(mesh, **settings))


def packed(c):
  """How many numbers the packed factors are, with the padding that reduce-scatters carry."""
  layout = kron.lay_out(c.curvature.blocks, kron.Deal(c.mesh.size, c.placement.local_inverses, c.placement.row_sharded))
  assert not any(s.row_sharded for s in layout.stacks.values())
  slots = lambda s: s.count if s.sparse else s.owners * s.slots  # noqa: E731
  return sum(slots(s) * s.n * (s.n + 1) // 2 for s in layout.stacks.values()), len(layout.partners)


MODELS = ('mlp', 'resnet', 'convnet', 'transformer')
SOME = [pytest.param(m, marks=[] if m == 'mlp' else [pytest.mark.long]) for m in MODELS]


@pytest.mark.long('mlp')
@pytest.mark.parametrize('model', SOME)
def test_a_refresh_moves_packed_factors_once_in_and_once_out(model):
  """In the compiled program, over data: what a step without one does not, is the factors, the inverses, and few numbers."""
  c = case(model, 'data=8', row_sharded=False)
  numbers, matrices = packed(c)
  refresh, plain = (audit(step, *arguments(c), mesh=c.mesh) for step in (c.step, c.plain))
  few = 64 * matrices + 256  # flags, counts, mean diagonals
  assert refresh.bytes() - plain.bytes() <= 2 * 4 * numbers + few
  inward = refresh.bytes('reduce-scatter')
  assert inward <= 4 * numbers


@pytest.mark.parametrize('model', SOME)
def test_statistics_travel_in_half_precision(model):
  """In the program as it is written; the CPU's compiler may widen it."""
  c = case(model, 'data=8', row_sharded=False, statistics='bfloat16')
  numbers, matrices = packed(c)
  found = written(c.step, *arguments(c), mesh=c.mesh)
  halves = [x for x in found if x.shapes[0].startswith('bfloat16')]
  others = [x for x in found if not x.shapes[0].startswith('bfloat16')]
  # All-reduces of sparse stacks are a reduce-scatter and an all-gather, the same bytes twice.
  assert sum(x.bytes for x in halves if x.kind == 'all-to-all') <= 2 * numbers + 64 * matrices
  assert sum(x.bytes for x in others) <= 4 * numbers + 64 * matrices


@pytest.mark.parametrize('model', SOME)
def test_a_step_without_refresh_moves_what_sgd_does(model):
  """COMM-OPT over data: the same bytes, to the last."""
  c = case(model, 'data=8')
  assert audit(c.plain, *arguments(c), mesh=c.mesh).summary() == first_order(c).summary()


@pytest.mark.parametrize('spec', ['data=4,model=2', pytest.param('data=2,fsdp=2,model=2', marks=pytest.mark.long)])
@pytest.mark.parametrize('model', SOME)
def test_over_sharded_parameters_gradients_are_gathered_once(model, spec):
  c = case(model, spec)
  plain, sgd = audit(c.plain, *arguments(c), mesh=c.mesh), first_order(c)
  params = jax.tree.leaves(jax.eval_shape(c.state)[0])
  gradients = sum(p.size * 4 for p in params)
  assert plain.bytes(axis='data') <= sgd.bytes(axis='data')
  shards = c.mesh.size // c.mesh.shape['data']
  assert plain.sent() <= sgd.sent() + gradients * (shards - 1) / shards + 64 * len(params)


@pytest.mark.long
def test_no_activation_is_gathered():
  """Tensor parallelism in pairs of columns and rows: all-reduces, and gathers of gradients alone."""
  c = case('transformer', 'data=4,model=2')
  largest = max(p.size * 4 for p in jax.tree.leaves(jax.eval_shape(c.state)[0]))
  assert_no_gather(audit(c.plain, *arguments(c), mesh=c.mesh), larger_than=largest, axis='data')
  assert_no_gather(first_order(c))


GOLDEN_CASES = [(m, s) for m in MODELS for s in ('data=8', 'data=4,model=2', 'data=2,fsdp=2,model=2')]


def golden(model, spec):
  c = case(model, spec)
  return {
    name: {k: list(v) for k, v in audit(step, *arguments(c), mesh=c.mesh).summary().items()}
    for name, step in (('refresh', c.step), ('plain', c.plain))
  }


@pytest.mark.parametrize(
  'model, spec',
  [pytest.param(*c, marks=[] if c == ('mlp', 'data=4,model=2') else [pytest.mark.long]) for c in GOLDEN_CASES],
)
def test_golden_tables(model, spec):
  """What each program communicates, as (executions, bytes). `python -m tests.parallel.make_golden` writes them anew."""
  tables = json.loads(GOLDEN.read_text())
  version = '.'.join(jax.__version__.split('.')[:2])
  if version not in tables:
    pytest.skip(f'golden.json has no tables for jax {version}; there are {", ".join(tables)}')
  found, expected = golden(model, spec), tables[version][f'{model} {spec}']
  for step, table in expected.items():
    # How many arrays share one collective is the compiler's affair; what they move is not.
    assert {k: v[1] for k, v in found[step].items()} == {k: v[1] for k, v in table.items()}


def test_a_loop_of_unknown_length_is_not_counted_exactly():
  """What is written in the body of a `while` may run any number of times, so that no bound on its bytes holds."""
  mesh = parallel.make_mesh('data=8')

  def run(x):
    return jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c + jax.lax.psum(c, 'data'), x)

  run = jax.shard_map(run, mesh=mesh, in_specs=P('data'), out_specs=P('data'), check_vma=False)
  found = parallel.written(run, jnp.ones(8), mesh=mesh)
  assert [c.exact for c in found] == [False]
  with pytest.raises(parallel.AuditError):
    parallel.assert_bytes(found, 10**9)

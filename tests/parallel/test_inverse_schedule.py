"""The schedule's small programs on a mesh renew what a refresh inside of the step renews, wherever the inverses live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron, parallel
from tests.kron.reference import close
from tests.parallel.problems import compiled, placed, problems

CASES = {
  'COMM-OPT': ('data=8', {}),
  'two axes': ('data=4,model=2', {}),
  'MEM-OPT': ('data=8', {'inverses': 'owners'}),
  'nothing split': ('data=4,model=2', {'inverses': 'owners', 'row_sharded': False}),
}


@pytest.mark.long
@pytest.mark.parametrize('case', CASES)
def test_a_mesh_renews_what_a_refresh_renews(x64, case):
  spec, settings = CASES[case]
  mesh = parallel.make_mesh(spec)
  c = compiled(problems(jnp.float64)['transformer'], mesh, jnp.float64, placement=parallel.Placement(mesh, **settings))
  options = {'damping': 1e-2, 'statistics_every': 1, 'inverses_every': 3, 'grow': False}
  keep = kron.inverse_schedule(c.curvature, placement=c.placement, **options)
  carry, batch = placed(c)
  first = carry[2]
  after = c.step(carry, batch)[0][2]
  expected = jax.device_get(kron.find_state(after).inverses)
  blank = kron.find_state(first).inverses
  state = kron.replace_state(after, kron.find_state(after)._replace(inverses=blank))
  shardings = jax.tree.map(lambda x: x.sharding, blank)
  assert any(np.abs(held - np.asarray(blank[name])).max() > 1e-2 for name, held in expected.items())
  for step in range(3):
    state = keep.refresh(state, step)
  found = kron.find_state(state).inverses
  assert jax.tree.map(lambda x: x.sharding, found) == shardings
  for name, held in expected.items():
    close(np.asarray(found[name]), held, 1e-10)
  assert set(keep.programs(state)) == {'damping', *expected}
  for fn, args in keep.programs(state).values():
    fn.lower(*args)

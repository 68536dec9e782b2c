"""Random programs: every block equals a reference that knows nothing of kron, or the program is refused by name.

`python scripts/random_programs.py --seed=0 --programs=300` is the same as the long test, and takes more where it is asked.
"""

import numpy as np
import pytest

from tests.kron.random_check import check
from tests.kron.random_sharded import check_sharded, sweep

PROGRAMS = 300
REFUSED = 0.3  # at most this share of many programs


def assert_sound(outcomes):
  bad = [o for o in outcomes if o.status not in ('exact', 'refused')]
  assert not bad, '\n'.join(f'seed {o.seed} ({o.fisher}, {", ".join(o.kinds)}): {o.status}, {o.detail}' for o in bad)
  refused = sum(o.status == 'refused' for o in outcomes)
  assert refused < max(len(outcomes), 2) and (len(outcomes) < 50 or refused <= REFUSED * len(outcomes)), (
    f'{refused} of {len(outcomes)} programs are refused'
  )


def test_a_random_program(x64):
  assert_sound([check(7001)])


@pytest.mark.long
@pytest.mark.parametrize('seed', [7000, 7004])
def test_random_data_parallel_steps(x64, seed):
  assert_sound([check_sharded(seed)])


@pytest.mark.long
@pytest.mark.parametrize('part', range(6))
def test_many_random_programs(x64, part):
  each = PROGRAMS // 6
  outcomes = sweep(range(part * each, (part + 1) * each))
  assert len(outcomes) >= each and np.isfinite([o.error for o in outcomes if o.status == 'exact']).all()
  assert_sound(outcomes)

"""kfac-jax beside ours: where it runs, it trains the same config; where it does not, a line says so."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import kron
from kronmesh.commands.compare import summarise, warm_up, why_not
from kronmesh.train import kfac_jax_peer
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train
from kronmesh.train.optimizers import PEERS
from kronmesh.train.sweeps.variants import member
from tests.draws import normal, normals
from tests.experiments.small import rows, small
from tests.kron.reference import close

ROOT = Path(__file__).parents[2]
# What each of these modules does is what a release of kfac-jax does on some release of JAX.
BROKEN = {
  'at its import': "raise AttributeError(\"module 'jax.core' has no attribute 'Effects'\")\n",
  'at its first step': 'def Optimizer(*args, **kwargs):\n  raise TypeError("no step\\nand more")\n',
}


@pytest.fixture
def installed():
  """Skips the test unless a kfac-jax that works is installed."""
  why = kfac_jax_peer.why_not() if importlib.util.find_spec('kfac_jax') else 'kfac_jax is not installed'
  if why:
    pytest.skip(why)


@pytest.fixture
def afresh(monkeypatch):
  """Has kfac-jax looked for anew, and again afterwards."""
  loaded = lambda: [name for name in sys.modules if name.partition('.')[0] == 'kfac_jax']  # noqa: E731
  for name in loaded():
    monkeypatch.delitem(sys.modules, name)
  kfac_jax_peer.why_not.cache_clear()
  yield
  for name in loaded():  # a broken one
    del sys.modules[name]
  kfac_jax_peer.why_not.cache_clear()


@pytest.mark.parametrize('when', BROKEN)
def test_a_kfac_jax_that_fails_is_one_line_with_the_remedy(when, tmp_path, monkeypatch, afresh):
  (tmp_path / 'kfac_jax.py').write_text(BROKEN[when])
  monkeypatch.syspath_prepend(tmp_path)
  line = why_not('kfac_jax:damping=3')
  assert line.startswith('the kfac-jax that is installed fails here (') and line.endswith(kfac_jax_peer.REMEDY)
  assert '\n' not in line and 'babd853' in line and 'git' in line and 'jax 0.12' in line
  with pytest.raises(ConfigError, match="'kfac_jax' cannot run: the kfac-jax that is installed fails"):
    build(small('kfac_jax'))


def test_where_there_is_none_the_package_is_named(monkeypatch, afresh):
  monkeypatch.setitem(sys.modules, 'kfac_jax', None)
  assert why_not('kfac_jax') == f'the package kfac_jax is not installed; {kfac_jax_peer.REMEDY}'


@pytest.mark.long
def test_the_table_has_the_line_and_the_other_optimisers(tmp_path):
  (tmp_path / 'kfac_jax.py').write_text(BROKEN['at its import'])
  command = [sys.executable, 'experiments/compare.py', '--optimizers=sgd,kfac_jax', '--seeds=1', '--config.steps=2']
  done = subprocess.run(
    [*command, f'--workdir={tmp_path / "run"}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
    check=True,
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
  )
  text = (tmp_path / 'run/table.txt').read_text()
  assert text in done.stdout and 'sgd' in text.splitlines()[2]
  assert text.splitlines()[-1].startswith(
    'kfac_jax: not run: the kfac-jax that is installed fails here (AttributeError: '
  )


def test_a_peer_has_settings_of_its_own_and_no_checkpoints():
  config, settings = member(small(), 'kfac_jax:damping=3:damping_rate=0.8')
  assert settings == {'kfac_jax.damping': 3.0, 'kfac_jax.damping_rate': 0.8}
  assert config.optimizer == 'kfac_jax' and config.keep_checkpoints == 0 and PEERS == (kfac_jax_peer.NAME,)


def test_it_trains_what_ours_trains(tmp_path, installed, monkeypatch):
  """The same first loss as another optimiser's, less at the end, and a summary like any other's."""
  config, _ = member(small(), 'kfac_jax:damping=0.1:burn_in_steps=2')
  run = build(config)
  warm_up(run)
  found = train(config, tmp_path / 'theirs', quiet=True, run=run)
  assert [row['step'] for row in found] == [3, 6]
  logged = [row for row in rows(tmp_path / 'theirs') if 'loss' in row]
  train(small('sgd'), tmp_path / 'sgd', quiet=True)
  first = next(row for row in rows(tmp_path / 'sgd') if 'loss' in row)
  np.testing.assert_allclose(logged[0]['loss'], first['loss'], rtol=1e-5)
  assert logged[-1]['loss'] < logged[0]['loss'] and {'damping', 'learning_rate', 'momentum'} <= set(logged[0])
  monkeypatch.setattr(
    'kronmesh.commands.compare._targets', lambda config: [config.target]
  )  # else of the command's flags
  summary = summarise('kfac_jax', run, [found])
  assert summary['final'] == [found[-1]['eval_error']] and summary['ms_per_step'] > 0
  json.dumps(summary)


@pytest.mark.parametrize('likelihood', ['categorical', 'bernoulli', 'gaussian'])
def test_it_is_told_of_the_same_curvature(likelihood, installed):
  """Its product of the exact Fisher with a vector is ours, of which each of six examples has five observations."""
  import kfac_jax

  mark = getattr(kron.observe, likelihood)
  more = {'variance': 0.25} if likelihood == 'gaussian' else {}
  x, params = normal(6, 5, 4), normals({'w': (4, 3), 'b': (3,)})

  def loss(params, x):
    return (mark(jnp.tanh(x @ params['w'] + params['b']), **more) ** 2).mean()

  vector = normals({'w': (4, 3), 'b': (3,)}, seed=3)
  theirs = kfac_jax.ImplicitExactCurvature(kfac_jax_peer.at_marks(loss, kfac_jax_peer.register))
  found = theirs.multiply_fisher((params, x), vector)
  expected = kron.curvature(loss, params, x).products(params, x, fisher='exact').fisher(vector)
  for name, value in expected.items():
    close(found[name], value, 1e-4)

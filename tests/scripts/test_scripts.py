"""The commands beside training: what they choose and print."""

import importlib

import pytest

from experiments.configs import digits, digits_classifier
from experiments.errors import ConfigError
from scripts.compare import table
from scripts.search import attempt, check_trials, rank


def summary(name, steps, by_seed, final):
  seconds = None if steps is None else steps / 10
  return {
    'optimizer': name, 'steps_to_target': steps, 'steps_by_seed': by_seed, 'seconds_to_target': seconds,
    'final': final, 'ms_per_step': 100.0,
  }  # fmt: skip


def test_the_table_says_what_was_not_reached():
  text = table([summary('kfac', 20, [18, 20, 22], 0.1), summary('adam', None, [None] * 3, 2.0)], 0.5, 'error', 80)
  kfac, adam = text.splitlines()[2:]
  assert kfac.split() == ['kfac', '20', '18', '20', '22', '1.00', 'of', 'it', '2.0', '0.1', '100.0']
  assert adam.split() == ['adam', '>', '80', '-', '-', '-', '<', '0.25', 'of', 'it', '-', '2', '100.0']


def test_a_table_without_the_first_one_at_the_target_claims_nothing():
  text = table([summary('kfac', None, [None], 3.0), summary('adam', 40, [40], 0.4)], 0.5, 'error', 80)
  assert 'of it' not in text and '> 80' in text


@pytest.mark.parametrize('config', [digits, digits_classifier])
def test_sweeps_try_every_optimiser_equally_often(config):
  trials = list(config.sweep())
  check_trials(trials)
  assert {t['optimizer'] for t in trials} == {'kfac', 'sgd', 'adam', 'muon'}
  for trial in trials:
    config.get_config().update_from_flattened_dict(trial)  # raises where a key is unknown
  # What the search chose stands in the config.
  for name in ('kfac', 'sgd', 'adam', 'muon'):
    own = [{k: v for k, v in t.items() if k != 'optimizer'} for t in trials if t['optimizer'] == name]
    chosen = config.get_config()
    assert any(all(chosen[name][k.split('.')[1]] == v for k, v in trial.items()) for trial in own), name


def test_unequal_sweeps_are_refused():
  with pytest.raises(ConfigError, match='equally often'):
    check_trials([{'optimizer': 'sgd'}, {'optimizer': 'adam'}, {'optimizer': 'adam'}])
  with pytest.raises(ConfigError, match="name the 'optimizer'"):
    check_trials([{'sgd.learning_rate': 1.0}])


def test_ranking():
  scores = [{'steps': None, 'final': None}, {'steps': None, 'final': 2.0}, {'steps': 9, 'final': 1.0}]
  scores += [{'steps': 9, 'final': 0.5}, {'steps': 7, 'final': 0.9}]
  assert [s['final'] for s in sorted(scores, key=lambda s: rank(s, True))] == [0.9, 0.5, 1.0, 2.0, None]
  assert [s['final'] for s in sorted(scores, key=lambda s: rank(s, False))] == [0.9, 1.0, 0.5, 2.0, None]


def test_a_trial_that_diverges_is_no_winner():
  config = digits.get_config()
  config.model.widths, config.steps, config.mesh = (8,), 6, 'data=8'
  config.data.batch_size = 64
  good = attempt(config, {'optimizer': 'sgd', 'sgd.learning_rate': 1e-3}, seed=0)
  bad = attempt(config, {'optimizer': 'sgd', 'sgd.learning_rate': 1e30}, seed=0)
  assert good['final'] is not None and bad == {'steps': None, 'final': None}


def test_commands_import_without_running():
  for name in ('scripts.compare', 'scripts.search', 'experiments.train'):
    assert importlib.import_module(name).main

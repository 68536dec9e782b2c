"""The commands beside training: what they choose and print."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.configs import digits, digits_classifier
from kronmesh.commands.compare import draw, table
from kronmesh.train.build import build
from kronmesh.train.errors import ConfigError
from kronmesh.train.optimizers import OPTIMIZERS, PEERS
from kronmesh.train.planning.programs import abstract, compile_all, held, programs_of
from kronmesh.train.registry import make_task
from kronmesh.train.reporting.tables import columns
from kronmesh.train.settings import defaults
from kronmesh.train.sweeps.trials import attempt, check_trials, rank, scored, try_all
from kronmesh.train.sweeps.variants import member
from scripts import few_labels, overhead_tables
from scripts.batches import configure, largest_batch
from scripts.overhead_tables import report
from tests import commands

ROOT = Path(__file__).parents[2]


def summary(name, steps, final):
  rows = [n and {'step': n, 'seconds': n / 10, 'examples': 32 * n} for n in steps]
  return {'optimizer': name, 'budget': 80, 'targets': {'0.5': rows}, 'final': final, 'ms_per_step': 100.0}


def test_the_table_has_medians_ranges_and_what_was_not_reached():
  text = table(
    [summary('kfac', [18, 20, 22], [0.1] * 3), summary('adam', [None, 70, None], [2.0, 0.4, None])], '0.5', 'e'
  )
  kfac, adam = (re.split(r'  +', line) for line in text.splitlines()[2:])
  assert kfac == ['kfac', '20 (18 to 22)', '-', '2.0 (1.8 to 2.2)', '640', '0.1', '100.0']
  assert adam == ['adam', '> 80', 'less than 25% of these', '- (7.0 to -)', '-', '2 (0.4 to -)', '100.0']


def test_a_table_without_the_first_one_at_the_target_claims_nothing():
  text = table([summary('kfac', [None], [3.0]), summary('adam', [40], [0.4])], '0.5', 'error')
  assert 'of these' not in text and '> 80' in text


def test_members_have_settings_of_their_own():
  config, settings = member(digits.get_config(), 'kfac:inverses_every=10:fisher=empirical:data.augment=True:steps=7')
  assert settings == {'kfac.inverses_every': 10, 'kfac.fisher': 'empirical', 'data.augment': True, 'steps': 7}
  assert config.kfac.inverses_every == 10 and config.steps == 7 and config.data.augment is True
  for wrong in ('kfac:inverses_evry=10', 'kfac:steps=many', 'kfac:steps'):
    with pytest.raises(ConfigError, match=f"'{wrong.partition(':')[2]}' of '{wrong}'"):
      member(digits.get_config(), wrong)
  with pytest.raises(ConfigError, match="'lbfgs' is unknown"):
    member(digits.get_config(), 'lbfgs:steps=3')


def test_every_optimiser_draws_as_many_numbers_from_as_many_free_settings():
  spaces = {name: draw(name, space, 5) for name, space in defaults.spaces().items()}
  assert set(spaces) == {*OPTIMIZERS, *PEERS}
  assert {len(trials) for trials in spaces.values()} == {5}
  assert {len(trial) for trials in spaces.values() for trial in trials} == {3}  # the optimiser and two settings
  config = defaults.defaults()
  for name, trials in spaces.items():
    assert len({json.dumps(trial) for trial in trials}) == 5
    for trial in trials:
      config.update_from_flattened_dict(trial)  # raises on an unknown key
      for key, (low, high) in defaults.spaces()[name].items():
        value = trial[f'{name}.{key.removeprefix("1-")}']
        value = 1 - value if key.startswith('1-') else value
        assert low * 0.99 <= value <= high * 1.01


@pytest.mark.parametrize('module', [digits, digits_classifier])
def test_configs_hold_what_an_equal_search_chose(module):
  """The recorded trials are those of the sweep, and the best of them stands in the config."""
  name = module.__name__.rsplit('.', 1)[1]
  trials, config = list(module.sweep()), module.get_config()
  check_trials(trials)
  scores = [json.loads(line) for line in (ROOT / 'docs' / name / 'trials.jsonl').read_text().splitlines()]
  assert [score['trial'] for score in scores] == trials
  for optimizer in ('kfac', 'sgd', 'adam', 'muon'):
    own = [score for score in scores if score['trial']['optimizer'] == optimizer]
    best = min(own, key=lambda score: rank(score, make_task(config).lower_is_better))['trial']
    chosen = config.copy_and_resolve_references()
    chosen.update_from_flattened_dict({k: v for k, v in best.items() if k != 'optimizer'})
    assert chosen == config, f'{optimizer}: {best}'


TABLES = {'README.md': ['digits'], 'docs/results.md': ['digits', 'digits_classifier']}
TABLES['docs/convergence.md'] = [
  f'convergence/{name}'
  for name in (
    'autoencoder',
    'autoencoder_whole',
    'resnet',
    'resnet_others',
    'batches',
    'staleness',
    'poisson',
    'text',
    'peers',
  )
]


TABLES['docs/performance.md'] = [f'performance/{n}' for n in ('autoencoder', 'text', 'resnet', 'mlp', 'digits')]
TABLES['docs/gan.md'] = ['gan/players']
OVERHEAD = sorted((ROOT / 'docs' / 'overhead').glob('*.json'))


def test_the_page_on_performance_shows_what_was_measured():
  page = (ROOT / 'docs/performance.md').read_text()
  assert len(OVERHEAD) == 9
  assert (ROOT / 'docs/conv_factors.txt').read_text().rstrip() in page
  for path in OVERHEAD:
    text = path.with_suffix('.txt').read_text().rstrip()
    assert report(json.loads(path.read_text())) == text
    assert text in page, path


@pytest.mark.parametrize('page', TABLES)
def test_pages_show_the_tables_as_printed(page):
  for name in TABLES[page]:
    assert (ROOT / 'docs' / name / 'table.txt').read_text().rstrip() in (ROOT / page).read_text()


def test_the_page_on_generators_shows_what_was_measured():
  page, where = (ROOT / 'docs/gan.md').read_text(), ROOT / 'docs/augmentation'
  found = few_labels.read(where / 'augmentation.jsonl', few_labels.Settings(300, 600))
  assert len(found) == 15 and few_labels.table(found) in (where / 'augmentation.txt').read_text()
  for text in (where / 'augmentation.txt', ROOT / 'docs/gan/scores.txt'):
    assert text.read_text().rstrip() in page


@pytest.mark.long
def test_the_page_on_graphs_shows_what_was_measured():
  own = (
    "import json; from scripts import zero_shot; print(zero_shot.table(json.load(open('docs/graphs/zero_shot.json'))))"
  )
  done = subprocess.run(
    [sys.executable, '-c', own], cwd=ROOT, capture_output=True, text=True, check=True
  )  # its own flags
  pages = [(ROOT / name).read_text() for name in ('docs/graphs.md', 'docs/graphs/zero_shot.txt')]
  assert done.stdout.strip() and all(done.stdout.strip() in page for page in pages)


def test_unequal_sweeps_are_refused():
  with pytest.raises(ConfigError, match='equally often'):
    check_trials([{'optimizer': 'sgd'}, {'optimizer': 'adam'}, {'optimizer': 'adam'}])
  with pytest.raises(ConfigError, match="name the 'optimizer'"):
    check_trials([{'sgd.learning_rate': 1.0}])


@pytest.mark.brief('search')
@pytest.mark.parametrize('name', ['compare', 'search'])
def test_a_config_without_a_target_is_refused_before_training(name, tmp_path):
  args = [f'experiments/{name}.py', '--config.target=0.0', f'--workdir={tmp_path / "run"}']
  done = commands.run(*args)
  assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith('error: set config.target')
  assert not (tmp_path / 'run').exists()


def test_ranking():
  scores = [{'steps': None, 'final': None}, {'steps': None, 'final': 2.0}, {'steps': 9, 'final': 1.0}]
  scores += [{'steps': 9, 'final': 0.5}, {'steps': 7, 'final': 0.9}]
  assert [s['final'] for s in sorted(scores, key=lambda s: rank(s, True))] == [0.9, 0.5, 1.0, 2.0, None]
  assert [s['final'] for s in sorted(scores, key=lambda s: rank(s, False))] == [0.9, 1.0, 0.5, 2.0, None]


@pytest.mark.long
def test_a_trial_that_diverges_is_no_winner():
  config = digits.get_config()
  config.model.widths, config.steps, config.mesh = (8,), 6, 'data=8'
  config.data.batch_size = 64
  good = attempt(config, {'optimizer': 'sgd', 'sgd.learning_rate': 1e-3}, seed=0)
  bad = attempt(config, {'optimizer': 'sgd', 'sgd.learning_rate': 1e30}, seed=0)
  assert good['final'] == good['curve'][-1][1] and bad == {'curve': [], 'final': None}
  config.target = good['curve'][0][1]
  assert scored(good, config)['steps'] == good['curve'][0][0] and scored(bad, config)['steps'] is None


def test_trials_are_run_again_when_the_config_changes(tmp_path, capsys, monkeypatch):
  config, calls = digits.get_config(), []
  monkeypatch.setattr(
    'kronmesh.train.sweeps.trials.attempt', lambda *a: calls.append(a) or {'curve': [(2, 0.5)], 'final': 0.5}
  )
  trials = [{'optimizer': 'sgd', 'sgd.learning_rate': 0.1}]
  for changes, count, steps in (({}, 1, 2), ({'target': 0.4}, 1, None), ({'model.widths': (8,)}, 2, None)):
    config.update_from_flattened_dict(changes)
    (score,) = try_all(config, trials, tmp_path / 'trials.jsonl', 0)
    assert (len(calls), score['steps']) == (count, steps)


def test_commands_import_without_running():
  for name in ('kronmesh.commands.compare', 'scripts.batches', 'kronmesh.commands.search', 'kronmesh.commands.train'):
    assert importlib.import_module(name).main


def test_the_largest_batch_is_the_last_before_examples_are_wasted():
  assert largest_batch({256: 1000, 512: 1400, 1024: 1500, 2048: 1501, 4096: 900}) == 1024
  assert largest_batch({256: 1000, 512: None, 1024: 1000}) == 256
  assert largest_batch({256: None, 512: 1000}) is None


def test_every_batch_has_the_same_budget_of_examples():
  config = digits.get_config()
  config.data.batch_size, config.kfac.inverses_every = 1024, 2
  for batch, steps, every, inverses in ((256, 937, 9, 8), (512, 468, 4, 4), (4096, 58, 1, 1), (16384, 14, 1, 1)):
    own = configure(config, batch, 240_000)
    assert own.kfac.inverses_every == inverses
    assert (own.steps, own.eval_every, own.data.batch_size, own.stop_at_target) == (steps, every, batch, True)


def test_columns_line_up():
  assert columns(['a', 'bb'], [['long', 0.333], ['x', 'y']]).splitlines() == [
    'a     bb',
    '--------',
    'long  0.33',
    'x     y',
  ]


def test_ratios_of_steps_are_to_the_median_of_others_and_the_worst_is_no_accident():
  times = {'sgd': [1.0, 1.0, 1.0, 9.0, 1.0, 1.0], 'kfac': [2.0, 2.0, 5.0, 2.0, 2.0, 7.0]}
  found = overhead_tables.summary(times, 3)['kfac']
  assert found['mean over sgd'] == (3 + 11 / 3) / 2 and found['mean over kfac'] == (1.5 + 11 / 6) / 2
  assert (found['median'], found['worst'], found['worst seen']) == (2, 6, 7)


@pytest.mark.long
def test_memory_counts_what_a_run_holds_beside_a_program():
  """The update and the inverses run while the gradient is held; a gradient's own is among its results."""
  config = digits.get_config()
  config.model.widths, config.data.batch_size, config.mesh = (8,), 64, 'data=8'
  run = build(config)
  state, batch = abstract(run)
  found = compile_all(programs_of(run, state, batch), state, batch)
  assert set(found) > {'gradient', 'gradient, statistics', 'update', 'inverses damping'}
  assert min(p['memory'] for p in found.values()) >= held(state) + held(batch) + held(state.params)


@pytest.mark.long
def test_overhead_tells_steps_programs_and_parts(tmp_path):
  """As a command, on a network of a few units; every ratio is there, and SGD's are 1."""
  out = tmp_path / 'overhead'
  settings = ('--config.model.widths=(8,4)', '--config.data.batch_size=16', '--blocks=1', f'--out={out}')
  settings = (*settings, '--config.kfac.statistics_every=2', '--config.kfac.inverses_every=4')
  done = commands.run('scripts/overhead.py', '--config=experiments/configs/noise.py:autoencoder', *settings)
  assert done.returncode == 0, done.stderr
  result = json.loads(out.with_suffix('.json').read_text())
  everything = 'kfac:statistics_every=1:inverses_every=1:subsample=1.0'
  assert list(result['steps']) == ['sgd', 'adam', 'kfac', 'kfac:fisher=sampled', everything]
  assert 'mean over sgd' in result['steps']['kfac']
  for name in ('kfac', everything):
    assert {'gradient', 'gradient, statistics', 'update', 'inverses damping'} < set(result['programs'][name])
    assert set(result['parts'][name]) == {'gradient', 'statistics', 'inverses', 'update'}
    assert all(x['least'] > 0 for x in result['floors'][name].values())
  programs = result['programs']['kfac']
  assert programs['gradient, statistics']['flops'] > programs['gradient']['flops'] > 0
  assert all(len(t) == 4 and min(t) > 0 for t in result['times'].values())
  assert out.with_suffix('.txt').read_text() == done.stdout


@pytest.mark.long
def test_overhead_names_what_is_wrong():
  done = commands.run('scripts/overhead.py', '--optimizers=kfac', '--blocks=0')
  assert done.returncode == 2 and done.stderr.strip() == 'error: --optimizers: name sgd first, and another'

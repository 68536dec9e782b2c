"""The command `kronmesh`: its subcommands, configs by name, and pages of help."""

import re
import runpy
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

import kronmesh
from kronmesh import extras
from kronmesh.commands import configs, main
from kronmesh.train.settings import configfile
from kronmesh.train.settings.overrides import resolved
from tests import commands

ROOT = Path(__file__).parents[2]


def said(capsys, monkeypatch, *words):
  """(exit code, output, errors) of `kronmesh *words` in this process."""
  monkeypatch.setattr(sys, 'argv', ['kronmesh', *words])
  try:
    main.main()
    code = 0
  except SystemExit as end:
    code = end.code
  return code, *capsys.readouterr()


def test_every_subcommand_has_a_launcher_and_a_first_line(capsys, monkeypatch):
  code, out, _ = said(capsys, monkeypatch)
  for name in main.COMMANDS:
    assert f'\n  {name} ' in out
    assert name == 'configs' or f"run('{name}', sys.argv[1:])" in (ROOT / f'experiments/{name}.py').read_text()
  assert code == 0


@pytest.mark.parametrize('word, hint', [('trian', "did you mean 'train'?"), ('x', 'choose from train, compare')])
def test_an_unknown_subcommand_is_one_line(word, hint, capsys, monkeypatch):
  code, out, err = said(capsys, monkeypatch, word)
  assert (code, out, len(err.splitlines())) == (2, '', 1) and hint in err


def test_the_version_is_that_of_the_package(capsys, monkeypatch):
  assert said(capsys, monkeypatch, '--version')[:2] == (0, f'kronmesh {kronmesh.__version__}\n')
  assert f'\nversion = {kronmesh.__version__}\n' in (ROOT / 'setup.cfg').read_text()
  assert f'\nversion: {kronmesh.__version__}\n' in (ROOT / 'CITATION.cff').read_text()


def test_all_configs_are_listed_with_their_first_lines():
  lines = configs.listing().splitlines()
  files = sorted(path.stem for path in (ROOT / 'experiments/configs').glob('[a-z]*.py'))
  assert [line.split()[0] for line in lines[: len(files)]] == files
  assert all(len(line.split()) > 4 for line in lines[: len(files)])


@pytest.mark.parametrize('value', ['digits', 'noise:vit_b'])
def test_a_config_is_described_by_flags_that_it_takes(value):
  text = configs.described(value)
  given = dict(
    line.removeprefix('--config.').split('=', 1) for line in text.splitlines() if line.startswith('--config.')
  )
  name, _, preset = value.partition(':')
  make = runpy.run_path(str(configfile.packaged()[name]))['get_config']
  config = make(preset) if preset else make()
  overrides = {key: shown.strip("'") for key, shown in given.items()}
  assert len(given) > 40
  assert all(
    config.to_dict() and resolved({key: shown}, config) is not None for key, shown in overrides.items() if shown
  )


@pytest.mark.parametrize(
  'value, found', [('digits', True), ('noise:vit_b', True), ('digts', False), ('x/digits.py', False)]
)
def test_names_become_paths(value, found):
  path = configfile.resolve(value)
  assert (path != value) == found
  if found:
    assert configfile.short_name(path) == value and Path(path.partition('.py')[0] + '.py').is_file()


def test_a_file_of_the_user_is_not_shadowed(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Path('digits').touch()
  assert configfile.resolve('digits') == 'digits'


@pytest.mark.parametrize(
  'args, words',
  [
    (['--config=digts'], 'did you mean --config=digits?'),
    (['--config.kfac.dampin=0.1'], "did you mean 'damping'"),
    (['--config.adam.lr=0.1'], "no key 'adam.lr'; adam has b1, b2, learning_rate"),
    (['digits'], "'digits' is not a flag"),
  ],
)
def test_a_typo_is_one_line(args, words):
  done = commands.run('experiments/train.py', *args)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr


@pytest.mark.brief('train')
@pytest.mark.parametrize('name', [name for name in main.COMMANDS if name != 'configs'])
def test_help_is_a_page(name):
  done = commands.run(f'experiments/{name}.py', '--help')
  lines = done.stdout.splitlines()
  assert done.returncode == 0 and f'  kronmesh {name}' in done.stdout and 8 < len(lines) < 60, done.stdout
  assert '--workdir=' in done.stdout and '--helpfull' in lines[-1]
  assert 'tfds' not in done.stdout and max(map(len, lines)) <= 124


def test_the_core_needs_five_packages_at_most():
  core = [line for line in requires('kronmesh') if 'extra ==' not in line]
  assert sorted(re.match('[a-z]+', line)[0] for line in core) == ['jax', 'jaxtyping', 'numpy', 'optax']


def test_importing_kron_and_parallel_loads_no_extra():
  code = (
    'import sys; from kronmesh import kron, parallel; '
    "names = ('flax', 'absl.app', 'ml_collections', 'orbax', 'grain', 'sklearn', 'einops', 'av'); "
    'print([name for name in names if name in sys.modules])'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'


def test_a_missing_library_is_named_with_its_extra():
  with pytest.raises(extras.MissingExtra, match=r"^nothing_here is not installed; pip install 'kronmesh\[video\]'$"):
    extras.load('video', 'nothing_here.sub')


@pytest.mark.parametrize('package', ['models', 'data', 'train'])
def test_a_package_says_which_extra_it_needs(package):
  code = (
    'import importlib.util as u, sys; find = u.find_spec\n'
    "u.find_spec = lambda name, *a: None if name in ('flax', 'tensorflow_datasets') else find(name, *a)\n"
    f'import kronmesh.{package}'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert "pip install 'kronmesh[train]'" in done.stderr.splitlines()[-1]

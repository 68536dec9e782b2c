"""Flags, config files and work folders that are wrong: one line that says what to change."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments import folder
from experiments.configs import digits
from experiments.errors import ConfigError
from experiments.overrides import parse_sweep
from experiments.ranges import check_ranges

ROOT = Path(__file__).parents[2]
BODY = 'from experiments.configs.digits import get_config as g\ndef get_config():\n'
FILES = {'none.py': BODY + '  g()\n', 'ends.py': 'import sys\nsys.exit(0)\n', 'good.py': BODY + '  return g()\n'}
WRONG = {
  'returns nothing': (['--config=none.py', '--config.steps=1'], "get_config() of 'none.py' returns no ConfigDict"),
  'ends the program': (['--config=ends.py'], 'the config file ends.py ends the program'),
  'is missing': (['--config=gone.py'], "no config file 'gone.py'; see experiments/configs"),
  'is a folder': (['--config=folder'], "no config file 'folder'; see experiments/configs"),
  'swallows a flag': (['--config', '--workdir=out'], "no config file '--workdir=out'; see experiments/configs"),
  'steps=1e3': (
    ['--config=good.py', '--config.steps=1e3'],
    '--config.steps=1e3 must be a whole number, written in digits',
  ),
  'a unicode minus': (['--config=good.py', '--config.steps=\u22123'], 'must be a whole number, written in digits'),
}


@pytest.mark.parametrize('name', WRONG)
def test_configs_on_the_command_line(tmp_path, name):
  for file, text in FILES.items():
    (tmp_path / file).write_text(text)
  (tmp_path / 'folder').mkdir()
  flags, words = WRONG[name]
  command = [sys.executable, str(ROOT / 'experiments/train.py'), '--dry_run', *flags]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('error: '), done.stderr
  assert words in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr and not (tmp_path / 'out').exists()


def test_help_is_help():
  command = [sys.executable, str(ROOT / 'experiments/train.py'), '--help']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert '--workdir' in done.stdout and 'error' not in done.stderr


@pytest.mark.parametrize('key', ['model.widths', 'steps', 'data.batch_size'])
def test_numbers_beyond_32_bits(key):
  config = digits.get_config()
  if key == 'model.widths':
    config.model.classes = 2**31
    key = 'model.classes'
  else:
    config.update_from_flattened_dict({key: 2**31})
  with pytest.raises(ConfigError, match=rf'config\.{key}=2147483648 must be in \(-2147483648, 2147483648\)'):
    check_ranges(config)


@pytest.mark.parametrize('name,make,words', [
  ('checkpoints', Path.touch, 'is no folder, which a run keeps there'), ('export', Path.touch, 'is no folder'),
  ('metrics.jsonl', Path.mkdir, 'is no file, which a run keeps there'), ('about.json', Path.mkdir, 'is no file'),
])  # fmt: skip
def test_work_folders_with_something_else_in_them(tmp_path, name, make, words):
  make(tmp_path / name)
  with pytest.raises(ConfigError, match=f'{name} {words}'), folder.claimed(tmp_path):
    pass
  with folder.claimed(tmp_path / 'other') as claim:
    claim.check()


def test_work_folders_that_are_none(tmp_path):
  (tmp_path / 'link').symlink_to(tmp_path / 'gone')
  (tmp_path / 'file').touch()
  for name, words in (('link', 'is a link to nowhere'), ('file', 'is a file, not a folder')):
    with pytest.raises(ConfigError, match=words), folder.claimed(tmp_path / name):
      pass


@pytest.mark.parametrize('text,words', [
  ('seed=0..99999999999', 'counts more than 10000 values'), ('seed=0..999;steps=1..999', '999000 combinations, more than'),
  ('seed=1,', 'has an empty value; take a comma away'), ('model.widths=(8,),(16,8', 'a bracket of .* is open'),
])  # fmt: skip
def test_sweeps_that_are_none(text, words):
  with pytest.raises(ConfigError, match=words):
    parse_sweep(text, digits.get_config())

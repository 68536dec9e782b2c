"""Every config that is shipped, whole: it says what it is, it can be built, and its step can be traced."""

import ast
import re
from pathlib import Path

import jax
import pytest

from kronmesh.train.build import build
from kronmesh.train.optimizers import OPTIMIZERS
from kronmesh.train.planning.plan import plan
from kronmesh.train.settings.overrides import resolved
from tests.data.idx import write_idx
from tests.experiments.small import build_on

ROOT = Path(__file__).parents[2]
FILES = sorted(p for p in (ROOT / 'experiments/configs').glob('*.py') if p.stem not in ('__init__', 'defaults'))


def load(path):
  scope = {}
  exec(compile(path.read_text(), path, 'exec'), scope)
  return scope


def presets(path):
  """Those that its docstring names behind a colon, or None for the only one."""
  default = load(path)['get_config'].__defaults__
  if not default:
    return [None]
  text = ' '.join(ast.get_docstring(ast.parse(path.read_text())).split())  # wherever lines end
  named = re.findall('`(\\w+)`', text.partition('Presets behind a colon')[2].partition('Measured')[0])
  assert default[0] in named
  return named


CASES = [(path, preset) for path in FILES for preset in presets(path)]


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_a_config_says_what_it_trains_its_command_and_what_was_measured(path):
  text = ast.get_docstring(ast.parse(path.read_text()))
  first, _, rest = text.partition('\n\n')
  assert first.endswith(('.', '?')) and '\n' not in first
  assert f'kronmesh train --config={path.stem}' in rest and '\nMeasured' in rest
  for page in re.findall(r'docs/\w+\.md', text):
    assert (ROOT / page).exists()


@pytest.mark.brief(
  'links:umls_distmult', 'digits_classifier', 'fashion_mnist_mlp', 'wordnet:small', 'fashion_mnist_resnet:small'
)
@pytest.mark.parametrize(
  'path, preset',
  CASES,
  ids=[f'{p.stem}:{n}' if n else p.stem for p, n in CASES],
)
def test_a_config_is_built_and_traced_as_it_is(tmp_path, path, preset, request):
  scope = load(path)
  config = scope['get_config'](*([preset] if preset else []))
  if config.data.name == 'imagenet2012':
    config.data.folder = request.getfixturevalue('imagenet_folder')
  if config.data.name == 'moving_fashion_mnist':
    config.data.folder = request.getfixturevalue('moving_folder')
  if path.stem in ('accidents', 'anomalies'):
    config.data.folder = request.getfixturevalue('scene_folder')
  if path.stem == 'videos':
    config.data.update(
      {'name': 'video_folder', 'source': request.getfixturevalue('video_folder'), 'folder': str(tmp_path / 'data')}
    )
    config.model.classes = 2
  if path.stem == 'directed_video':
    config.data.update({'folder': request.getfixturevalue('directed_folder'), 'held_out': ()})
  if path.stem == 'wordnet':
    config.data.source = request.getfixturevalue('wordnet_folder')
    config.data.eval_split = 'train'  # none of so few links can be held out
  if path.stem == 'links':
    config.data.source = request.getfixturevalue('triples_folder')
  config.data.graph_source = request.getfixturevalue('wordnet_folder')
  if config.data.name == 'fashion_mnist':
    write_idx(tmp_path / 'idx', packed=True, train=256, test=64)
    config.data.folder, config.data.source = str(tmp_path / 'data'), str(tmp_path / 'idx')
  # What measures one device, on one.
  run = build_on(config, jax.devices()[:1]) if config.data.name == 'noise' else build(config)
  text = plan(run, tmp_path / 'run')
  assert 'Gflop' in text and not (tmp_path / 'run').exists()
  assert config.optimizer in OPTIMIZERS
  for overrides in scope.get('sweep', lambda: ())():
    resolved(overrides, config)


def test_an_unknown_preset_is_named():
  with pytest.raises(ValueError, match="preset 'smal' is unknown; choose from"):
    load(ROOT / 'experiments/configs/noise.py')['get_config']('smal')

"""`experiments/plan.py`: what it says of a config on a mesh, and that real steps take it."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.configs import noise, resolution
from kronmesh import parallel
from kronmesh.train.planning import forecast
from tests import commands

ROOT = Path(__file__).parents[2]
long = pytest.mark.long


def plan(*flags):
  """What the command prints, and its exit code."""
  done = commands.run('experiments/plan.py', *flags)
  return done.stdout + done.stderr, done.returncode


SMALL = '--config=experiments/configs/noise.py:small_resnet3d'


@pytest.mark.long
def test_a_plan():
  text, code = plan(SMALL, '--config.model.blocks=(1,)', '--config.model.width=4', '--mesh=data=2,space=3', '--json')
  assert code == 0, text
  found = json.loads(text)
  assert found['mesh'] == {'data': 2, 'space': 3}
  (note,) = found['notes']
  assert note.startswith('axis 2 of the images, 16 rows over space=3: strips of 6, 2 rows (12.5%) of padding; 2 or 4')
  gradient = found['programs']['gradient, statistics']
  assert gradient['memory'] == gradient['held'] + gradient['temporaries'] + gradient['results'] > found['state']
  assert gradient['collectives']['collective-permute over space'][1] > 0
  gathers = [g for p in found['programs'].values() for g in p['gathers']]
  assert gathers and all('inverses go from their owners' in g['cause'] for g in gathers)


@pytest.mark.long("flags0-error: --mesh='data=-1': give every axis its size")
@pytest.mark.parametrize(
  'flags, words',
  [
    (['--mesh=data=-1'], "error: --mesh='data=-1': give every axis its size"),
    pytest.param(['--mesh=space=x'], "error: --mesh='space=x': give every axis its size", marks=pytest.mark.long),
    pytest.param(['--mesh=data=1024'], 'has 1024 devices; at most 512 are emulated', marks=pytest.mark.long),
    pytest.param(
      ['--mesh=data=2', '--devices=4'],
      "error: --mesh='data=2' has 2 devices, --devices=4; give one of both",
      marks=pytest.mark.long,
    ),
  ],
)
def test_mistakes_are_one_line(flags, words):
  text, code = plan(SMALL, *flags)
  assert code == 2 and words in text and len(text.splitlines()) == 1


@pytest.mark.long
def test_the_best_mesh_is_the_least_divided_that_fits():
  base = ('--config=experiments/configs/resolution.py:small_hd', '--devices=8')
  text, code = plan(*base, '--memory=80')
  assert code == 0 and 'best mesh: --config.mesh=space=8' in text, text  # one clip: only its strips can be divided
  text, code = plan(*base, '--memory=0.001')
  assert code == 0 and 'no mesh of 8 devices with 0 GiB was found' in text
  assert 'GiB a device where 0 are allowed' in text and 'times the space' in text


def test_a_search_skips_what_cannot_be_and_reads_no_data(tmp_path):
  flags = ('--config=digits', '--config.model.widths=(16, 8)', '--config.optimizer=adam')
  text, code = plan(*flags, '--config.data.batch_size=3', '--devices=16', f'--config.data.folder={tmp_path}/none')
  assert code == 2 and len(text.splitlines()) == 1 and 'divides over no mesh of 16 devices' in text, text
  text, code = plan(*flags, '--config.data.batch_size=4', '--devices=4', f'--config.data.folder={tmp_path}/none')
  assert code == 0 and 'best mesh: --config.mesh=data=4' in text, text
  assert not (tmp_path / 'none').exists() and max(map(len, text.splitlines())) <= 124


@pytest.mark.long
def test_meshes_that_cannot_be_are_listed(tmp_path):
  text, code = plan(
    '--config=noise:small_resnet', '--config.data.batch_size=4', '--config.data.shape=(6,6,3)', '--devices=8'
  )
  assert code == 0 and 'skipped\n' in text and 'fewer rows than that' in text, text


def test_shapes_are_known_without_the_data(tmp_path):
  from kronmesh import data

  for shape, expected in (((5, 4, 4), (4, 4, 1)), ((5, 4, 4, 3), (4, 4, 3)), ((5, 7), (7,))):
    np.savez(tmp_path / 'train.npz', image=np.zeros(shape, np.float32), label=np.zeros(5, np.int32))
    assert data.example_shape('arrays', str(tmp_path)) == expected
  assert data.example_shape('digits') == data.load_arrays('digits', 'test').inputs.shape[1:]
  with pytest.raises(data.DataError, match="no array 'image'"):
    data.example_shape('arrays', str(tmp_path / 'nowhere'))


def test_candidates_divide_the_batch():
  config = noise.get_config('small_resnet3d')
  for mesh in forecast.candidates(config, 64, images=True):
    sizes = parallel.parse_mesh(mesh, 64)
    assert config.data.batch_size % (sizes.get('data', 1) * sizes.get('fsdp', 1)) == 0
  config = resolution.get_config('8k')
  assert forecast.candidates(config, 16, images=True) == ['space=16']
  assert forecast.candidates(config, 16, images=False) == []


@pytest.mark.long
def test_memory_of_real_steps():
  """A transformer's steps take what was planned, within a tenth; see scripts/check_plan.py for convolutions on a CPU."""
  command = ['scripts/check_plan.py', '--config=experiments/configs/noise.py:small_vit', '--mesh=data=2']
  done = commands.run(*command, '--config.data.batch_size=2048')
  assert done.returncode == 0, done.stderr
  for program, numbers in json.loads(done.stdout.splitlines()[-1]).items():
    assert 0.9 < numbers['planned'] / numbers['measured'] < 1.1, (program, numbers)


@pytest.mark.long
def test_8k_in_16_strips():
  """An 8K step of 16 frames, K-FAC and all, in less than 80 GiB a device, nothing gathered along the strips."""
  text, code = plan('--config=experiments/configs/resolution.py:8k', '--mesh=space=16', '--json')
  assert code == 0, text
  found = json.loads(text)
  assert found['memory'] < 80 * 2**30
  assert not [g for name, p in found['programs'].items() if name.startswith('gradient') for g in p['gathers']]

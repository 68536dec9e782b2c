"""All tests run on eight emulated CPU devices, under the settings that commands get from `launch`."""

import atexit
import gc
import os
import shutil
import tempfile
import zlib
from importlib.metadata import version

# What one test has compiled serves the others, on all workers and in the commands they start.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='kronmesh-tests-')
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

# Most of a test's time is XLA compiling small programs, two to four times as fast like this.
# `XLA_FLAGS= make test` compiles as users do.
fast = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1'
)
if version('jaxlib').startswith('0.10.'):  # later ones do not know it, and end
  fast += ' --xla_cpu_use_fusion_emitters=false'
os.environ.setdefault('XLA_FLAGS', fast)

if os.environ.get('KRONMESH_SHAPES'):
  from jaxtyping import install_import_hook

  import tests.shapes  # noqa: F401  (which the hook reads by its name)

  install_import_hook(['kronmesh.kron', 'kronmesh.parallel', 'kronmesh.models'], 'tests.shapes.check')

from kronmesh.train.runtime import launch  # isort: skip  # noqa: F401  (sets the environment before JAX loads)

import jax
import pytest

# Commands that tests start compile many small programs, and the same again; JAX has read its own environment by now.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

# Programs being traced are many small objects, of which few are garbage: looking for it took a twelfth of the time.
gc.set_threshold(200_000, 50, 100)

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_cpu_enable_async_dispatch', False)


@pytest.fixture
def x64():
  """float64 for the length of one test."""
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


@pytest.fixture(scope='session')
def imagenet_folder(tmp_path_factory):
  """A folder with mock data prepared as imagenet2012."""
  from tests.data.mock_imagenet import Imagenet2012

  folder = tmp_path_factory.mktemp('tfds')
  Imagenet2012(data_dir=folder, file_format='array_record').download_and_prepare()
  return str(folder)


@pytest.fixture(scope='session')
def moving_folder(tmp_path_factory):
  """A folder with some clips of moving_fashion_mnist."""
  from unittest import mock

  from kronmesh import data
  from tests.data.idx import write_idx

  folder = tmp_path_factory.mktemp('moving')
  write_idx(folder / 'idx', packed=True, train=64, test=20)
  with mock.patch('kronmesh.data.moving._COUNT', {'train': 512, 'test': 64}):
    data.load_arrays('moving_fashion_mnist', 'test', folder=str(folder), source=str(folder / 'idx'))
  return str(folder)


@pytest.fixture(scope='session')
def directed_folder(tmp_path_factory, wordnet_folder):
  """A folder with some clips of directed_motion."""
  from unittest import mock

  import numpy as np

  from kronmesh import data
  from tests.data.idx import write_idx

  folder = tmp_path_factory.mktemp('directed')
  write_idx(folder / 'idx', packed=True, train=200, test=100)
  with mock.patch('kronmesh.data.directed._COUNT', {'train': 256, 'test': 64}):
    data.load_directed('test', np.eye(10, dtype=bool), folder=str(folder), source=str(folder / 'idx'))
  return str(folder)


@pytest.fixture(scope='session')
def scene_folder(tmp_path_factory):
  """A folder with some of the scenes of dashcam and surveillance, the latter of a made film."""
  from unittest import mock

  import numpy as np

  from kronmesh import data
  from kronmesh.data.dashcam import Dashcam
  from kronmesh.data.surveillance import Surveillance

  folder = tmp_path_factory.mktemp('scenes')
  frames = np.full((795, 72, 96, 3), 150, np.uint8)
  for t in range(795):
    frames[t, 30:46, 4 + t % 80 : 10 + t % 80] = 30
  data.write_video(folder / 'street.avi', frames, rate=10)
  with (
    mock.patch.object(Dashcam, 'COUNT', {'train': 6, 'validation': 2, 'test': 12}),
    mock.patch.object(Surveillance, 'COUNT', {'train': 6, 'validation': 3, 'test': 18}),
  ):
    for name in data.SCENES:
      data.load_scenes(name, 'test', folder=str(folder), source=str(folder / 'street.avi'))
  return str(folder)


@pytest.fixture(scope='session')
def video_folder(tmp_path_factory):
  """Some videos of two classes, as folder/split/class/*.mp4."""
  from tests.data.films import film

  folder = tmp_path_factory.mktemp('videos')
  for split, count in (('train', 10), ('test', 4)):
    for label, rate in (('slow', 5), ('fast', 20)):
      (folder / split / label).mkdir(parents=True)
      for i in range(count):
        film(folder / split / label / f'{i}.mp4', count=20 + i, rate=rate)
  return str(folder)


@pytest.fixture(scope='session')
def wordnet_folder(tmp_path_factory):
  """Files of WordNet's form, with Fashion-MNIST's classes as garments or shoes."""
  from kronmesh import data
  from tests.data.wordnet_files import write_wordnet

  return write_wordnet(tmp_path_factory.mktemp('wordnet'), [noun for noun, _ in data.GARMENTS])


@pytest.fixture(scope='session')
def triples_folder(tmp_path_factory):
  """A knowledge graph of 40 entities and 3 relations."""
  import numpy as np

  folder, rng = tmp_path_factory.mktemp('triples'), np.random.default_rng(0)
  found = [(f'e{i}', 'next', f'e{(i + 1) % 40}') for i in range(40)]  # so that train has all
  found += [(f'e{i}', f'r{j}', f'e{rng.integers(40)}') for i in range(40) for j in range(2)]
  parts = found[:80] + found[90:100], found[80:90], found[100:]
  for name, triples in zip(('train', 'valid', 'test'), parts, strict=True):
    (folder / f'{name}.txt').write_text(''.join('\t'.join(t) + '\n' for t in triples))
  return str(folder)


def pytest_addoption(parser):
  parser.addoption('--tests', default='brief', choices=('brief', 'long', 'all'), help='which tests to run')
  parser.addoption('--share', default='', help='K/N: of these tests every Nth, from number K, counted from 0')


def variant(item):
  """Returns the part of a test's name in brackets."""
  return item.name.partition('[')[2][:-1]


def is_long(item):
  """Returns whether `make test-all` runs this test.

  `long` alone marks all variants of a test, `long('a', 'b')` these two, and `brief('a', 'b')` all but these two.
  """
  chosen = item.get_closest_marker('brief')
  if chosen and variant(item) not in chosen.args:
    return True
  return any(not m.args or variant(item) in m.args for m in item.iter_markers('long'))


def has_wrong_types(item):
  """Returns whether this test passes what a signature forbids, which the checks of SHAPES=1 refuse in other words."""
  return any(not m.args or variant(item) in m.args for m in item.iter_markers('wrong_types'))


def unknown_variants(items):
  """Yields what is wrong with marks that name variants of a test that it does not have."""
  variants = {}
  for item in items:
    variants.setdefault(item.nodeid.partition('[')[0], set()).add(variant(item))
  for item in items:
    for mark in (m for name in ('brief', 'long', 'wrong_types') for m in item.iter_markers(name)):
      for name in set(mark.args) - variants[item.nodeid.partition('[')[0]]:
        yield f'{item.nodeid}: the mark {mark.name} names the variant {name!r}, which this test does not have'


def pytest_collection_modifyitems(config, items):
  part_of_a_test = any('::' in arg for arg in config.args)  # which may have fewer variants than its marks name
  if not part_of_a_test and (wrong := sorted(set(unknown_variants(items)))):
    raise pytest.UsageError(wrong[0])
  share = config.getoption('--share')
  number, count = map(int, share.split('/')) if share else (0, 1)
  wanted = {'brief': (False,), 'long': (True,), 'all': (False, True)}[config.getoption('--tests')]
  chosen = [i for i in items if is_long(i) in wanted and zlib.crc32(i.nodeid.encode()) % count == number]
  if os.environ.get('KRONMESH_SHAPES'):
    chosen = [i for i in chosen if not has_wrong_types(i)]
  config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
  items[:] = chosen


@pytest.fixture(scope='session')
def browser():
  """Chromium without a window; pages must say nothing to its console."""
  driver = shutil.which('chromedriver')
  if driver is None:
    pytest.skip('no chromedriver here: apt-get install chromium chromium-driver')
  from selenium import webdriver
  from selenium.webdriver.chrome.service import Service

  options = webdriver.ChromeOptions()
  quiet = ('quic', 'background-networking', 'component-update', 'sync', 'gpu')
  for flag in ('headless=new', 'no-sandbox', 'no-first-run', *(f'disable-{name}' for name in quiet)):
    options.add_argument(f'--{flag}')
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  found = webdriver.Chrome(options=options, service=Service(driver))
  yield found
  found.quit()

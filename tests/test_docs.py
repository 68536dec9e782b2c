"""What the documents show runs, and what they point to is there."""

import doctest
import functools
import importlib
import inspect
import pkgutil
import re
import shlex
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import kronmesh
from experiments.configs import digits
from kronmesh import data, kron, models, parallel
from tests.draws import integers, normal

ROOT = Path(__file__).parents[1]
GUIDES = sorted((Path(__file__).parents[1] / 'docs/guides').glob('*.md'))


def modules():
  for package in (data, kron, models, parallel):
    yield package
    for found in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):
      yield importlib.import_module(found.name)


@pytest.mark.long
def test_docstrings_run():
  results = [doctest.testmod(module) for module in modules()]
  assert sum(r.attempted for r in results) > 5 and not any(r.failed for r in results)


def test_a_number_in_brackets_after_a_setting_is_its_default():
  defaults = {name: p.default for name, p in inspect.signature(kron.curvature).parameters.items()}
  defaults |= digits.get_config().to_dict()
  pages = [path.read_text() for path in (ROOT / 'docs').rglob('*.md')]
  named = [match for page in pages for match in re.findall(r'`(\w+)` \(([\d.,]+)\)', page)]
  assert 'max_factor' in dict(named)
  for name, number in named:
    assert float(number.replace(',', '')) == defaults[name], name


@pytest.mark.brief('1')
@pytest.mark.parametrize('loops', [1, 2])
def test_the_readme_trains(loops):
  """The README's own lines in a loop, and then in the faster one, which lowers the loss."""
  code = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)[:loops]
  k = jax.random.split(jax.random.key(0), 3)
  batch = {'inputs': jax.random.normal(k[0], (64, 12)), 'label': jax.random.randint(k[1], (64,), 0, 4)}
  model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(4)])
  names = {'model': model, 'batch': batch, 'params': model.init(k[2], batch['inputs'])['params'], 'key': k[2]}
  names |= {'batches': [batch] * 20, 'optax': optax, 'jax': jax, 'jnp': jnp, 'functools': functools}
  for lines in code:
    before = jax.tree.map(jnp.copy, names['params'])  # which a loop may donate
    exec(lines, names)
  variables = ({'params': params} for params in (before, names['params']))
  losses = [
    optax.softmax_cross_entropy_with_integer_labels(model.apply(v, batch['inputs']), batch['label']).mean()
    for v in variables
  ]
  assert losses[1] < 0.7 * losses[0]


@pytest.mark.long
def test_the_sharding_page_trains():
  code = re.search(r'```python\n(.*?)```', (ROOT / 'docs/sharding.md').read_text(), re.DOTALL).group(1)
  model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(4)])
  batch = {'inputs': normal(64, 12), 'label': integers(4, 64)}

  def loss_fn(params, batch):
    logits = kron.observe.categorical(model.apply({'params': params}, batch['inputs']), batch['label'])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

  params = model.init(jax.random.key(0), batch['inputs'])['params']
  names = {'loss_fn': loss_fn, 'params': params, 'batch': batch, 'optax': optax}
  exec(code, names)
  assert loss_fn(names['params'], batch) < names['loss']


@pytest.mark.parametrize(
  'page',
  [
    'README.md',
    'CONTRIBUTING.md',
    *[f'docs/{name}.md' for name in ('architecture', 'results', 'coverage', 'convergence', 'sharding')],
    *[f'docs/guides/{path.name}' for path in GUIDES],
  ],
)
def test_files_named_in_a_page_are_there(page):
  text = (ROOT / page).read_text()
  named = set(re.findall(r'`((?:src|experiments|scripts|tests|docs)/[\w./]+)`', text))
  named |= {f'{(ROOT / page).parent.relative_to(ROOT)}/{link}' for link in re.findall(r'\]\(([\w./]+)\)', text)}
  for name in (name for name in named if '/api/' not in name):  # these pages are made with the site
    assert (ROOT / name).exists(), f'{page} names {name}'


# What the code of a page leaves behind, by page.
LEFT = {
  'index.md': lambda names: names['loss'] < 1.2,
  'explain/factors.md': lambda names: jnp.allclose(
    optax.apply_updates(names['w'], names['updates']), jnp.array([[1.0, -1.0], [1.0, 1.0]]), atol=2e-3
  ),
  'explain/sites.md': lambda names: str(names['curvature']) in (ROOT / 'docs/explain/sites.md').read_text(),
  'guides/my_config.md': lambda names: names['get_config']().steps == 40 and len(list(names['sweep']())) == 3,
  'guides/mesh.md': lambda names: names['loss'] < 0.9 and names['mesh'].size == 8,
  'guides/recipes.md': lambda names: names['losses'][-1] < 0.8 * names['losses'][0] and names['accumulated_loss'] < 0.9,
}


@pytest.mark.brief('explain/factors.md', 'explain/sites.md', 'guides/my_config.md', 'index.md')
@pytest.mark.parametrize('page', LEFT)
def test_the_code_of_a_page_runs(page):
  text = (ROOT / 'docs' / page).read_text()
  names = {}
  for code in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
    exec(code.replace("jax.config.update('jax_num_cpu_devices', 4)", '').replace('data=4', 'data=8'), names)
  assert LEFT[page](names)


def test_the_start_page_agrees_with_the_readme():
  """Both say how to install, and name the same comparison."""
  pages = [(ROOT / name).read_text() for name in ('README.md', 'docs/index.md')]
  for words in ("pip install 'kronmesh[train]'", 'kronmesh train --config=digits'):
    assert all(words in page for page in pages)


@pytest.mark.long
def test_the_guide_to_an_own_loop_trains():
  code = '\n'.join(re.findall(r'```python\n(.*?)```', (ROOT / 'docs/guides/own_loop.md').read_text(), re.DOTALL))
  names = {}
  exec(code, names)
  start = {'w1': jax.random.normal(names['key'], (12, 16)) / 4, 'w2': jax.random.normal(names['key'], (16, 4)) / 4}
  assert names['loss'] < 0.8 * names['loss_fn'](start, names['batch'])


COMMANDS = [
  (path.stem, ' '.join(line.split()))
  for path in [*GUIDES, ROOT / 'docs/sharding.md', ROOT / 'README.md']
  for block in re.findall(r'```\n(.*?)```', path.read_text(), re.DOTALL)
  for line in block.replace('\\\n', ' ').splitlines()
  if re.match(r'(HOSTFILE=\w+ )?(\.venv/bin/python |python |(\.venv/bin/)?kronmesh |scripts/launch|sbatch)', line)
]


@pytest.mark.parametrize('page, line', COMMANDS)
def test_commands_in_a_page_name_scripts_flags_and_keys_that_are_there(page, line):
  from kronmesh.commands.main import COMMANDS
  from kronmesh.train.settings.configfile import packaged, resolve
  from kronmesh.train.settings.overrides import parse_sweep, resolved

  words = shlex.split(line)
  scripts = [w for w in words if re.fullmatch(r'(experiments|scripts)/[\w/]+\.(py|sh|sbatch)', w)]
  assert scripts or words[1] in (*COMMANDS, '--version')
  assert all((ROOT / s).exists() for s in scripts)
  flags = dict(w[2:].split('=', 1) if '=' in w else (w[2:], '') for w in words if w.startswith('--') and w != '--nodes')
  flags.pop('nodes', None)
  path = ROOT / resolve(flags.pop('config', 'digits')).partition(':')[0]
  path, scope = path if path.exists() else packaged()['digits'], {}  # a file of the user's own
  exec(path.read_text(), scope)
  config = scope['get_config']()
  resolved({k.removeprefix('config.'): v for k, v in flags.items() if k.startswith('config.')}, config)
  if 'sweep' in flags:
    parse_sweep(flags['sweep'], config)
  source = ''.join(
    p.read_text() for f in ('experiments', 'scripts', 'src/train', 'src/commands') for p in (ROOT / f).rglob('*.py')
  )
  for name in (k for k in flags if not k.startswith('config.')):
    assert re.search(rf"DEFINE_\w+\(\s*'{name}'", source), f'{page}: --{name}'


def test_the_coverage_page_shows_what_the_commands_printed():
  from tests.kron.gallery import GALLERY

  page = (ROOT / 'docs/coverage.md').read_text()
  assert (ROOT / 'docs/compile_cost.txt').read_text() in page
  own = page.split('<!-- table -->')[1].split('<!-- end -->')[0]
  rows = re.findall(r'^\| (.+?) \|', own, re.MULTILINE)
  assert rows[1:] == list(GALLERY)


def test_the_sharding_page_shows_what_the_command_printed():
  assert (ROOT / 'docs/scale.txt').read_text() in (ROOT / 'docs/sharding.md').read_text()


def test_the_package_is_the_one_of_this_folder():
  assert Path(kronmesh.__file__).resolve().parent == ROOT / 'src'

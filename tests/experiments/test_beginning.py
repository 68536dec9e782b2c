"""Runs that begin with what another one learned, and networks that learn from another one's logits."""

import jax
import numpy as np
import optax
import pytest

from experiments.configs import digits_classifier
from kronmesh.tasks import basic
from kronmesh.train.beginning import new_state
from kronmesh.train.build import build
from kronmesh.train.checkpoints import load_export
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train
from tests.experiments.small import losses


def config_of(**settings):
  config = digits_classifier.get_config()
  config.devices, config.mesh = 0, 'data=4,model=2'
  config.model.hidden = (16, 8)
  config.data.batch_size, config.steps, config.eval_every = 64, 4, 2
  config.optimizer = 'sgd'
  config.update(settings)
  return config


@pytest.fixture(scope='module')
def first(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('first')
  train(config_of(), workdir, quiet=True)
  return workdir


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_begins_with_the_values_of_another(first, tmp_path):
  variables, _ = load_export(first / 'export')
  for mesh, folder in (('data=4,model=2', first), ('data=8', first / 'export')):
    config = config_of(start=str(folder), mesh=mesh)
    config.recipe.average = 0.5
    state = new_state(build(config))
    equal(state.params, variables['params'])
    equal(state.average, variables['params'])
    assert int(state.step) == 0
  train(config_of(start=str(first)), tmp_path / 'second', quiet=True)
  assert losses(tmp_path / 'second')[0] < losses(first)[0]


def test_a_begun_run_goes_on_bit_for_bit(first, tmp_path):
  config = config_of(start=str(first))
  train(config, tmp_path / 'whole', quiet=True)
  half = config_of(start=str(first), checkpoint_every=2)

  def cut(state, batch, number, run):
    if number == 2:
      raise KeyboardInterrupt
    return run.step(state, batch, number)

  run = build(half)
  with pytest.raises(KeyboardInterrupt):
    train(half, tmp_path / 'parts', quiet=True, run=run._replace(step=lambda *a: cut(*a, run)))
  train(half, tmp_path / 'parts', quiet=True, run=run)
  equal(*(load_export(tmp_path / name / 'export')[0]['params'] for name in ('whole', 'parts')))


def test_another_network_is_refused(first, tmp_path):
  config = config_of(start=str(first))
  config.model.hidden = (16, 9)
  with pytest.raises(ConfigError, match=r"config.start='.*': 'hidden_1/bias' has the shape \(8,\), not \(9,\)"):
    train(config, tmp_path / 'run', quiet=True)
  config.model.hidden = (16, 8, 8)
  with pytest.raises(ConfigError, match="has no parameter 'hidden_2/bias'; its network is another one"):
    train(config, tmp_path / 'deeper', quiet=True)
  with pytest.raises(ConfigError, match='no export in'):
    train(config_of(start=str(tmp_path / 'none')), tmp_path / 'nothing', quiet=True)


def test_a_teachers_logits_are_learned(first):
  config = config_of()
  plain = build(config)
  batch = next(plain.train_batches(0, 0))
  params, variables = plain.init(3).params, load_export(first / 'export')[0]
  config.recipe.update({'teacher': str(first), 'teacher_share': 0.25, 'teacher_temperature': 3.0})
  student = build(config)
  logits = lambda p: plain.task.model.apply({'params': p}, batch['inputs'])  # noqa: E731
  mine, theirs = logits(params), logits(variables['params'])
  hard = optax.softmax_cross_entropy_with_integer_labels(mine, batch['label']).mean()
  soft = optax.softmax_cross_entropy(mine / 3, jax.nn.softmax(theirs / 3)).mean()
  value = student.task.loss(params, {}, batch, True)[0]
  np.testing.assert_allclose(value, 0.75 * hard + 0.25 * 9 * soft, rtol=1e-5)
  np.testing.assert_allclose(student.task.loss(params, {}, batch, False)[0], hard, rtol=1e-5)


def test_kfac_learns_from_a_teacher(first, tmp_path):
  config = config_of(optimizer='kfac')
  config.recipe.update({'teacher': str(first), 'teacher_share': 1.0})
  train(config, tmp_path / 'run', quiet=True)
  assert losses(tmp_path / 'run')[-1] < losses(tmp_path / 'run')[0]


def test_a_teacher_of_other_classes_is_refused(first):
  config = config_of()
  config.recipe.teacher, config.model.classes = str(first), 11
  with pytest.raises(
    ConfigError, match="is a run of 'classify' with 10 classes; it must be a classifier with the same"
  ):
    basic.read_teacher(config)
  config.task = 'reconstruct'
  with pytest.raises(ConfigError, match=r'recipe\.teacher has logits of classes'):
    build(config)

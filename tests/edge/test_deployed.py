"""From a trained run to a packed file: pruned, trained on, packed, and equal in every form; mistakes in one line."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import digits_classifier, ternary_digits
from kronmesh import edge, models
from kronmesh.edge import EdgeError, choice, pack
from kronmesh.tasks import deployed, pruning
from kronmesh.train.beginning import new_state
from kronmesh.train.build import build
from kronmesh.train.checkpoints import load_export
from kronmesh.train.errors import ConfigError, RunError
from kronmesh.train.loop import train
from kronmesh.train.task import make_model


def config_of(preset, **settings):
  config = ternary_digits.get_config(preset)
  config.mesh = 'data=2'
  config.model.widths, config.model.pools = (4, 6, 6), (2, 1, 2)
  config.model.depthwise = (False, False, True)
  config.data.batch_size, config.steps, config.eval_every = 64, 8, 4
  config.kfac.inverses_every = 2
  config.update(settings)
  return config


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A float run, what was pruned of it in both ways, and a run that goes on from there."""
  folder = tmp_path_factory.mktemp('runs')
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()
    patch.setattr(jax, 'devices', lambda *a: devices[:2])
    train(config_of('float'), folder / 'float', quiet=True)
    patch.undo()
    done = {by: pruning.prune(folder / 'float', folder / by, 0.75, by, 4) for by in pruning.WAYS}
    patch.setattr(jax, 'devices', lambda *a: devices[:1])
    tuned = config_of('chosen', start=str(folder / 'curvature'), mesh='data=1')
    train(tuned, folder / 'tuned', quiet=True)
  return folder, done


@pytest.fixture
def one_device(monkeypatch):
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *a: devices)


def test_what_was_chosen(runs):
  _, done = runs
  for by, found in done.items():
    assert set(found.zeros) == {'layer_0', 'layer_1', 'layer_2', 'head'}, by
    hidden = 4 * 6 * 9 * found.zeros['layer_1'] + 6 * 9 * found.zeros['layer_2']
    assert 0.75 * 270 - 2 <= hidden <= 0.85 * 270, by
    assert 0.45 < found.zeros['layer_0'] < 0.65 and 0.45 < found.zeros['head'] < 0.65, by
  # What magnitude chooses for all layers costs more, by the curvature itself.
  assert sum(done['curvature'].cost.values()) < sum(done['magnitude'].cost.values())


def test_factors_are_those_of_the_effective_weights(runs, one_device):
  """The cost is the second-order growth of the loss, measured with batch norms that see their batch."""
  folder, _ = runs
  variables, _ = load_export(folder / 'float' / 'export')
  config = config_of('float', mesh='data=1', start=str(folder / 'float'))
  config.kfac.update({'subsample': 1.0, 'fisher': 'exact'})
  run = build(config)
  layers = pruning.layers_of(run, new_state(run), 2)
  for name, block in pruning._kernels(run).items():
    kernel = variables['params'][name]['kernel']
    weights = np.stack([layer.weight for key, layer in layers.items() if key[0] == name])
    np.testing.assert_allclose(pruning._as_kernel(block, weights, kernel.shape), kernel, rtol=1e-6)


def test_a_run_goes_on_with_the_chosen_zeros(runs, one_device):
  folder, done = runs
  pruned, tuned = (load_export(folder / name)[0] for name in ('curvature', 'tuned'))
  begun = new_state(build(config_of('chosen', start=str(folder / 'curvature'), mesh='data=1')))
  jax.tree.map(np.testing.assert_array_equal, begun.params, pruned['params'])
  assert not np.array_equal(tuned['params']['layer_1']['kernel'], pruned['params']['layer_1']['kernel'])
  states = begun.model_state['edge'], pruned['edge'], tuned['edge']
  masks = [{k: v for k, v in state.items() if k != 'step'} for state in states]
  for other in masks[1:]:
    jax.tree.map(np.testing.assert_array_equal, masks[0], other)
  assert int(tuned['edge']['step']) == 8
  for size in deployed.sizes(deployed.deploy(folder / 'tuned').network):
    assert 1 - size.nonzero / size.weights == pytest.approx(done['curvature'].zeros[size.name], abs=1e-9)


def test_a_packed_run_is_equal_in_every_form(runs, one_device, tmp_path):
  folder, _ = runs
  found = deployed.pack_run(folder / 'tuned', tmp_path / 'net.kmt', 200)
  assert found.examples == 200 and found.bytes == (tmp_path / 'net.kmt').stat().st_size
  assert found.float_bytes > 5 * found.bytes
  network = deployed.deploy(folder / 'tuned').network
  again = pack.load(tmp_path / 'net.kmt')
  inputs, labels = deployed.evaluation(config_of('chosen', mesh='data=1'), 50)
  sums = edge.streams(again, edge.reference.quantised(inputs, 4))[-1]
  np.testing.assert_array_equal(sums, edge.streams(network, edge.reference.quantised(inputs, 4))[-1])
  assert len(labels) == 50


def test_a_network_that_differs_is_noticed(runs, one_device):
  folder, _ = runs
  found = deployed.deploy(folder / 'tuned')
  inputs, _ = deployed.evaluation(found.config, 60)
  head = found.network.head._replace(offset=found.network.head.offset + 1)
  with pytest.raises(RunError, match="the run's evaluation differs from the reference in examples 0 to 59"):
    deployed.compared(found, found.network._replace(head=head), inputs)


def test_mistakes_are_told_in_one_line(runs, tmp_path, one_device):
  folder, _ = runs
  with pytest.raises(EdgeError, match="rule='float' has no integers"):
    deployed.deploy(folder / 'float')
  with pytest.raises(ConfigError, match='no export in'):
    deployed.deploy(tmp_path / 'none')
  with pytest.raises(ConfigError, match=r"--by='size' is unknown; choose from curvature, magnitude"):
    pruning.prune(folder / 'float', tmp_path / 'out', 0.5, 'size')
  with pytest.raises(ConfigError, match=r'holds a run, whose export would be replaced; choose another --workdir'):
    pruning.prune(folder / 'float', folder / 'float', 0.5)
  other = digits_classifier.get_config()
  other.devices, other.mesh, other.steps, other.optimizer = 0, 'data=1', 1, 'sgd'
  train(other, tmp_path / 'mlp', quiet=True)
  for call in (deployed.deploy, lambda f: pruning.prune(f, tmp_path / 'out', 0.5)):
    with pytest.raises(ConfigError, match=r"is a run of config.model.name='mlp'"):
      call(tmp_path / 'mlp')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'settings, words',
  [
    ({'rule': 'half'}, "rule 'half' is unknown; choose from float, mean, share, learned, chosen"),
    ({'widths': (4, 6), 'pools': (1, 2, 2)}, r'\(1, 2, 2\) has 3 values for 2 layers'),
    ({'bits': 0}, "bits=0 does not go with rule='share'; logic has levels"),
  ],
)
def test_a_network_that_cannot_be_is_refused(settings, words):
  config = config_of('share', mesh='data=1')
  config.model.update(settings)
  net = make_model(config)
  with pytest.raises(ValueError, match=words):
    net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def test_shares_of_zeros_grow_and_end_where_they_should():
  config = config_of('share', mesh='data=1')
  config.model.update({'zeros': 0.9, 'start_zeros': 0.2, 'ramp_steps': 4})
  net = make_model(config)
  variables = net.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
  variables, shares = nn.meta.unbox(variables), []
  for _ in range(6):
    shares.append(np.mean(models.ternary.network(net, variables, (8, 8, 1)).layers[1].weights == 0))
    _, new = net.apply(variables, jnp.zeros((2, 8, 8, 1)), train=True, mutable=['batch_stats', 'edge'])
    variables = {**variables, **new}
  expected = [0.9 + (0.2 - 0.9) * (1 - min(i / 4, 1)) ** 3 for i in range(6)]
  np.testing.assert_allclose(shares, expected, atol=0.01)


def test_a_learned_threshold_has_a_gradient_and_kfac_takes_it():
  config = config_of('share', mesh='data=1')
  config.model.rule = 'learned'
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda *a: devices)
    run = build(config)
  state, batch = run.init(0), next(run.train_batches(0, 0))
  grads = jax.grad(lambda p: run.task.loss(p, state.model_state, batch, True)[0])(state.params)
  assert all(float(jnp.abs(grads[name]['threshold'])) > 0 for name in ('layer_0', 'layer_1', 'head'))
  (curvature,) = run.curvatures.values()
  assert 'layer_1/kernel' in {p for b in curvature.blocks for p in b.params}


def test_the_price_of_a_weight_moves_zeros():
  rng = np.random.default_rng(0)
  make = lambda price: choice.Layer(rng.standard_normal((20, 5)), np.eye(20), np.eye(5), price)  # noqa: E731
  chosen = choice.under_budget({'cheap': make(1.0), 'dear': make(4.0)}, 200)
  cheap, dear = (np.count_nonzero(chosen[n].signs) for n in ('cheap', 'dear'))
  assert cheap > 1.5 * dear

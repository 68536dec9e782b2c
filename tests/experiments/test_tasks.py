"""The losses of tasks, against what they are defined to be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronmesh import data, kron, models
from kronmesh.tasks import basic, graphs
from kronmesh.train.settings import defaults


def loss_of(task, model):
  return {**basic.LOSSES, **graphs.LOSSES}[task](model, defaults.defaults())


class Solution(nn.Module):
  """What a network must be for the Poisson task to be solved; wrong by a factor."""

  factor: float

  @nn.compact
  def __call__(self, points, train=False):
    x, y = points.T
    border = 16 * x * (1 - x) * y * (1 - y)
    return (self.factor * jnp.sin(jnp.pi * x) * jnp.sin(2 * jnp.pi * y) / border)[:, None]


@pytest.mark.brief('1.1')
@pytest.mark.parametrize('factor', [1.0, 1.1])
def test_poisson_s_loss_and_error(factor):
  points = data.load_arrays('poisson', 'test')
  batch = {'inputs': jnp.asarray(points.inputs), 'label': jnp.asarray(points.label)}
  _, (metrics, _) = loss_of('poisson', Solution(factor))({}, {}, batch)
  # Residuals are those of the solution itself, whose mean square is 1/4.
  assert float(metrics['loss']) == pytest.approx((factor - 1) ** 2 / 8, abs=1e-6)
  assert float(metrics['error']) == pytest.approx((factor - 1) ** 2, abs=1e-6)


@pytest.mark.long
def test_the_loss_of_the_next_token_and_its_observations():
  model = models.Transformer(vocabulary=7, length=6, layers=1, width=8, heads=2)
  tokens = jax.random.randint(jax.random.key(0), (4, 6), 0, 7)
  params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), tokens[:, :-1]))['params']
  loss = jax.jit(loss_of('next_token', model), static_argnames='train')
  logits = nn.log_softmax(jax.jit(model.apply)({'params': params}, tokens[:, :-1]))
  each = np.array([[-logits[b, t, tokens[b, t + 1]] for t in range(5)] for b in range(4)])
  assert float(loss(params, {}, {'inputs': tokens})[0]) == pytest.approx(each.mean(), rel=1e-5)
  masked = {'inputs': tokens, 'mask': jnp.array([1.0, 1.0, 0.0, 0.0])}
  assert float(loss(params, {}, masked)[0]) == pytest.approx(each[:2].mean(), rel=1e-5)
  # Every token is an observation, and of a masked sequence none is.
  for batch, count in (({'inputs': tokens}, 20), (masked, 10)):
    curvature = kron.curvature(loss, params, {}, batch, has_aux=True)
    stats = jax.jit(curvature.value_and_grad)(params, {}, batch, key=jax.random.key(2))[2]
    assert stats.examples == count

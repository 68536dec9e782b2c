"""The choice of zeros: against an exhaustive search, and that it is as the budget says."""

import itertools

import numpy as np
import pytest

from kronmesh.edge import choice


def layer(inputs, outputs, seed=0, **more):
  rng = np.random.default_rng(seed)
  factor = lambda n: np.cov(rng.standard_normal((n, n)) @ rng.standard_normal((n, 50)))  # noqa: E731
  return choice.Layer(rng.standard_normal((inputs, outputs)), factor(inputs), factor(outputs), **more)


def own_channels(one):
  """The layer with the diagonal of G alone, for which channels do not depend on each other."""
  return one._replace(g=np.diag(np.diag(one.g)))


def test_the_cost_is_that_of_the_kronecker_product():
  one = layer(4, 3)
  chosen = choice.by_magnitude(one.weight, 7)
  change = (chosen.signs * chosen.scale - one.weight).ravel()
  assert choice.cost(one, chosen) == pytest.approx(0.5 * change @ np.kron(one.a, one.g) @ change)


def test_no_single_move_lowers_the_cost_and_no_sweep_raises_it():
  one, price = own_channels(layer(12, 5)), 0.3
  total = lambda c: choice.cost(one, c) + price * np.count_nonzero(c.signs)  # noqa: E731
  found, before = choice.by_magnitude(one.weight, 60), np.inf
  for _ in range(30):
    found = choice.at_price(one, price, found, 1)
    assert total(found) <= before + 1e-9
    before = total(found)
  for i, j in np.ndindex(one.weight.shape):
    for value in (-1, 0, 1):
      signs = found.signs.copy()
      signs[i, j] = value
      assert total(choice.Chosen(signs, found.scale)) >= before - 1e-9


def test_it_comes_near_the_best_of_all():
  costs = []
  for seed in range(10):
    one = own_channels(layer(6, 2, seed))
    one, price = choice.Layer(one.weight[:, :1], one.a, one.g[:1, :1]), 0.5
    total = lambda c, one=one, price=price: choice.cost(one, c) + price * np.count_nonzero(c.signs)  # noqa: E731
    every = []
    for signs in itertools.product((-1, 0, 1), repeat=6):
      signs = np.array(signs, float)[:, None]
      every.append(total(choice.Chosen(signs, choice.fitted(one, signs, np.ones(1)))))
    found = choice.at_price(one, price, choice.by_magnitude(one.weight, 6), 20)
    costs.append((total(found), min(every), total(choice.by_magnitude(one.weight, 3))))
  found, best, magnitude = np.mean(costs, 0)
  assert found - best < 0.3 * (magnitude - best)


@pytest.mark.parametrize('share', [0.05, 0.2, 0.6])
def test_the_budget_is_used_and_not_exceeded(share):
  layers = {'first': layer(20, 8), 'dear': layer(15, 6, 1, price=3.0), 'head': layer(6, 4, 2, one_scale=True)}
  budget = share * sum(x.price * x.weight.size for x in layers.values())
  chosen = choice.under_budget(layers, budget)
  spent = sum(layers[n].price * np.count_nonzero(c.signs) for n, c in chosen.items())
  assert 0.8 * budget <= spent <= budget
  assert len(set(chosen['head'].scale)) == 1


def test_it_costs_less_than_magnitude_at_the_same_budget():
  layers = {f'layer {i}': layer(30, 10, i) for i in range(3)}
  budget = 0.2 * 3 * 300
  chosen = choice.under_budget(layers, budget)
  largest = {n: choice.by_magnitude(x.weight, 60) for n, x in layers.items()}
  costs = [sum(choice.cost(layers[n], c[n]) for n in layers) for c in (chosen, largest)]
  assert costs[0] < 0.7 * costs[1]


def test_an_input_that_says_what_another_says_is_left_out():
  """Two equal inputs: one weight for both is as good as two."""
  a = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) + 1e-6 * np.eye(3)
  one = choice.Layer(np.array([[0.5], [0.5], [1.0]]), a, np.eye(1))
  chosen = choice.under_budget({'layer': one}, 2)['layer']
  assert np.count_nonzero(chosen.signs[:2]) == 1 and chosen.signs[2] == 1
  assert choice.cost(one, chosen) < 1e-5 < choice.cost(one, choice.by_magnitude(one.weight, 2))

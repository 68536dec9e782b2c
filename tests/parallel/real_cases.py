"""Defines `Case`, and makes one from a module or from a plain function."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kronmesh import kron


class Case(NamedTuple):
  """Holds a loss and its shapes; nothing is ever allocated.

  loss: (params, state, batch, key) -> a scalar, a mean over the batch.
  params, state: ShapeDtypeStructs; every device holds them whole.
  batch: the shapes of one example's arrays.
  each: examples on a device.
  options: of `kron.curvature`.
  """

  loss: Callable
  params: Any
  state: Any
  batch: tuple
  each: int = 32
  options: Mapping[str, Any] = {}


def f32(*shape):
  """Returns the type of an array of floats."""
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape):
  """Returns the type of an array of integers."""
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def leading(n, tree):
  """Returns the shapes of `n` examples."""
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct((n, *s.shape), s.dtype), tree)


def cross_entropy(logits, y):
  """Returns the mean cross-entropy, with the logits marked."""
  logits = kron.observe.categorical(logits, y)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def squared(z, y):
  """Returns half of the mean squared distance, with the outputs marked."""
  z, y = z.reshape(z.shape[0], -1), jnp.reshape(y, (jnp.shape(y)[0], -1))
  return 0.5 * ((kron.observe.gaussian(z) - y) ** 2).sum(-1).mean()


def sigmoid_cross_entropy(logits, y):
  """Returns a discriminator's loss where y is its label, with the logits marked."""
  logits = kron.observe.bernoulli(logits)
  return optax.sigmoid_binary_cross_entropy(logits, jnp.broadcast_to(y, logits.shape)).sum(-1).mean()


def linen(module, *inputs, target=None, objective=cross_entropy, each=32, options=None, **kwargs):
  """Returns the case of a flax.linen module; `inputs` and `target` are of one example, `kwargs` of its call."""
  params, state = variables(module, *inputs, **kwargs)

  def loss(params, state, batch, key):
    del key
    *xs, y = batch
    return objective(module.apply({'params': params, **state}, *xs, mutable=list(state), **kwargs)[0], y)

  return Case(loss, params, state, (*inputs, i32() if target is None else target), each, options or {})


def variables(module, *inputs, **kwargs):
  """Returns the shapes of a module's parameters and of its other collections."""
  init = functools.partial(module.init, **kwargs)
  found = dict(nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), *leading(1, inputs))))
  return found.pop('params'), found


def plain(network, shapes, *inputs, target=None, objective=cross_entropy, each=32):
  """Returns the case of network(params, *inputs) with parameters of these shapes."""

  def loss(params, state, batch, key):
    del state, key
    *xs, y = batch
    return objective(network(params, *xs), y)

  return Case(loss, structs(shapes), {}, (*inputs, i32() if target is None else target), each)


def structs(shapes):
  """Returns the types of parameters with these shapes."""
  return jax.tree.map(lambda shape: f32(*shape), shapes, is_leaf=lambda s: isinstance(s, tuple))


def layer_norm(x, scale, shift):
  """Normalises features, then scales and shifts them."""
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + shift


def rms_norm(x, scale):
  """Divides features by their root mean square, then scales them."""
  return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def attention(q, k, v, bias=0.0):
  """Averages values by softmax; arrays are (batch, token, head, feature)."""
  scores = jnp.einsum('bthd,bshd->bhts', q, k) / np.sqrt(q.shape[-1]) + bias
  return jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores), v)


def causal(length):
  """Returns what is added to the scores so that no token sees a later one."""
  return jnp.where(np.tril(np.ones((length, length), bool)), 0.0, -1e9)

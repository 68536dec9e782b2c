"""Convolutional networks with ternary weights and activations of a few bits, for logic (`edge`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..edge import activations, fold, program, ternary
from ..edge.errors import EdgeError
from ..edge.layers import Conv, Head, Network, Numbers, Plan, bits_of, check
from .layers import constrain, named

EPSILON, MOMENTUM = 1e-5, 0.9  # of the batch norms


class TernaryNet(nn.Module):
  """Maps images to logits by convolutions, batch norms and clipped activations, with weights in {-s, 0, s}.

  `apply(variables, x, train=False)` takes images (b, h, w, c) in [0, 1] and returns logits, (b, classes), or (b, h, w,
  classes) with `by_place`. With `train`, the loss sees ternary weights whose gradient goes to the hidden float weights,
  and the collections 'batch_stats' and 'edge' must be mutable. Without, the network is folded to integers, and computes
  what its logic will compute (`edge.program`). With rule='float' it is an ordinary network in both: with bits=0 and
  input_bits=0 wholly, else with rounded activations.

  Where an attribute may be a sequence, it has one value for each layer; a single value is for all.

  Attributes:
    widths: channels after each convolution.
    classes: the number of outputs.
    kernels: the sides of the windows, odd.
    strides: the distances of windows.
    pools: the sides of the places whose maximum is kept after the activation, 1 for none.
    depthwise: whether each channel has its own window.
    adds: the stream that is added before the activation, 0 for the input, i for layer i - 1; None for none.
    bits: of the activations; 0, with rule='float' alone, for none that are rounded.
    input_bits: of the input, likewise.
    rule: which weights are zero: 'mean' (|w| below 0.7 of the layer's mean), 'share' (the smallest, as many as `zeros`
      says), 'learned' (|w| below a learned share of the mean), 'chosen' (those of the collection 'edge') or 'float' (no
      weight is ternary).
    zeros: the share of zeros.
    first_zeros: the share of zeros of the first layer.
    head_zeros: the share of zeros of the head.
    start_zeros: the share at the first step.
    ramp_steps: the steps over which the share grows from `start_zeros` to its end; 0: it does not change.
    head_bits: 2 for a ternary head, 8 for one of fixed point.
    reach: the value, after a batch norm, that the largest level stands for.
    by_place: whether the head gives outputs at every place.
    dtype: the type of the computation; parameters are float32.

  Raises:
    ValueError: the rule is unknown, or a sequence has not one value for each layer.
  """

  widths: Sequence[int]
  classes: int
  kernels: int | Sequence[int] = 3
  strides: int | Sequence[int] = 1
  pools: int | Sequence[int] = 1
  depthwise: bool | Sequence[bool] = False
  adds: int | Sequence[int | None] | None = None
  bits: int | Sequence[int] = 4
  input_bits: int = 4
  rule: str = 'share'
  zeros: float | Sequence[float] = 0.8
  first_zeros: float = 0.5
  head_zeros: float = 0.5
  start_zeros: float = 0.0
  ramp_steps: int = 0
  head_bits: int = 2
  reach: float = 2.0
  by_place: bool = False
  dtype: Any = jnp.float32

  def plan(self) -> Plan:
    """Returns the network's shape."""
    columns = (self.kernels, self.strides, self.pools, self.depthwise, self.adds, self.bits)
    columns = [each(value, len(self.widths)) for value in columns]
    convs = tuple(Conv(width, *rest) for width, *rest in zip(self.widths, *columns, strict=True))
    return Plan(convs, self.classes, self.input_bits, self.by_place)

  @property
  def gradient_only(self) -> tuple[str, ...]:
    """Returns the names of the parameters that K-FAC has no factors for: learned thresholds."""
    layers = (*(f'layer_{i}' for i in range(len(self.widths))), 'head')
    return tuple(f'{layer}/threshold' for layer in layers) if self.rule == 'learned' else ()

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], train: bool = False) -> Float[Array, 'b *place classes']:
    if self.rule not in ternary.RULES:
      raise ValueError(f'rule {self.rule!r} is unknown; choose from {", ".join(ternary.RULES)}')
    if self.rule != 'float' and not all((self.input_bits, *each(self.bits, len(self.widths)))):
      raise ValueError(
        f"bits=0 does not go with rule={self.rule!r}; logic has levels: give 1 to 8 bits, or rule='float'"
      )
    step = self.variable('edge', 'step', lambda: jnp.zeros((), jnp.int32))
    zeros = (self.first_zeros, *each(self.zeros, len(self.widths))[1:], self.head_zeros)
    rules = [_Rule(self.rule, z, min(self.start_zeros, z), self.ramp_steps, step.value) for z in zeros]
    plan = self.plan()
    x = activations.rounded(x, self.input_bits) if self.input_bits else x
    values, numbers = [x.astype(self.dtype)], []
    for i, conv in enumerate(plan.convs):
      settings = _Settings(rules[i], bits_of(plan, i), self.reach, self.dtype)
      y, folded = _Layer(conv, names(i), name=f'layer_{i}')(values, settings, train)
      numbers.append(folded)
      values.append(y)
    settings = _Settings(rules[-1], bits_of(plan, len(plan.convs)), self.reach, self.dtype)
    axes = (names(len(plan.convs))[0], 'classes')
    result, head = _Head(plan, axes, self.head_bits, name='head')(values[-1], settings)
    if train and not self.is_initializing():
      step.value = step.value + 1
    if train or self.rule == 'float':
      return result
    if not self.is_initializing():
      self.sow('network', 'numbers', (tuple(numbers), head))  # only where the caller makes 'network' mutable
    sums = program.levels(plan, tuple(numbers), head, program.quantised(values[0], self.input_bits))
    return sums.astype(jnp.float32) * head.scale


def network(net: TernaryNet, variables: Any, shape: tuple[int, int, int]) -> Network:
  """Returns the network of integers of trained variables, for images of `shape` (height, width, channels).

  Raises:
    EdgeError: its weights are not ternary, or a sum could overflow.
  """
  if net.rule == 'float':
    raise EdgeError("a network with rule='float' has no integers; train one with config.model.rule=share")
  run = jax.jit(lambda v: net.apply(v, jnp.zeros((1, *shape)), mutable=['network'])[1]['network']['numbers'][0])
  layers, head = jax.device_get(run(variables))
  return check(Network(net.plan(), shape, tuple(layers), Head(head.weights, head.offset, float(head.scale))))


class _Rule(NamedTuple):
  """Which weights of a layer are zero: a rule of `TernaryNet`, the share of zeros in the end and at first, the step."""

  name: str
  zeros: float
  start: float
  steps: int
  step: Int[Array, '']

  def kept(self, weight: Float[Array, '*axes']) -> Bool[Array, '*axes']:
    if self.name == 'mean':
      return ternary.above_mean(weight)
    return ternary.largest(weight, ternary.ramp(self.step, self.zeros, self.start, self.steps))


class _Settings(NamedTuple):
  """What a layer takes besides its shape: its rule, the bits of its input, and what its network says."""

  rule: _Rule
  bits_in: int
  reach: float
  dtype: Any


def each(value: Any, count: int) -> tuple:
  """Returns one value for each of `count` layers.

  Raises:
    ValueError: a sequence has another length.
  """
  if not isinstance(value, list | tuple):
    return (value,) * count
  if len(value) != count:
    raise ValueError(f'{tuple(value)} has {len(value)} values for {count} layers')
  return tuple(value)


def names(layer: int) -> tuple[str, str]:
  """Returns the logical axes of a layer's inputs and outputs: along `model`, layers are split by columns and by rows."""
  return ('in', 'mid') if layer % 2 == 0 else ('mid', 'in')


class _Layer(nn.Module):
  """A convolution, its batch norm, the clipped activation, and what is added and pooled."""

  conv: Conv
  names: tuple[str, str]

  @nn.compact
  def __call__(self, values: list[Array], settings: _Settings, train: bool) -> tuple[Array, Numbers | None]:
    conv, x = self.conv, values[-1]
    inputs = 1 if conv.depthwise else x.shape[-1]
    init = named(
      nn.initializers.he_normal(), 'window', 'window', None if conv.depthwise else self.names[0], self.names[1]
    )
    weight = self.param('kernel', init, (conv.kernel, conv.kernel, inputs, conv.width))
    signs, scale, effective = _weights(self, weight, settings.rule)
    norm = nn.BatchNorm(not train, momentum=MOMENTUM, epsilon=EPSILON, dtype=settings.dtype, name='norm')
    y = norm(program.sums(x, conv, effective.astype(settings.dtype)))
    added = 0 if conv.add is None else values[conv.add]
    if not conv.bits:
      y = nn.relu(y + added)
    elif conv.add is None:
      y = activations.rounded(y / settings.reach, conv.bits)
    else:
      y = jnp.clip(activations.signed(y / settings.reach, conv.bits) + added, 0, 1)
    params, stats = norm.variables['params'], norm.variables['batch_stats']
    if settings.rule.name == 'float':
      return constrain(program.pooled(y, conv.pool), 'batch', None, None, self.names[1]), None
    folded = fold.Norm(params['scale'], params['bias'], stats['mean'], stats['var'], EPSILON)
    folded = fold.numbers(signs, scale, folded, conv, settings.bits_in, settings.reach)
    return constrain(program.pooled(y, conv.pool), 'batch', None, None, self.names[1]), folded


class _Head(nn.Module):
  """The mean over all places, or every place, times a matrix."""

  plan: Plan
  names: tuple[str, str]
  bits: int

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], settings: _Settings) -> tuple[Array, Head]:
    plan = self.plan
    init = named(nn.initializers.lecun_normal(), *self.names)
    weight = self.param('kernel', init, (x.shape[-1], plan.outputs))
    bias = self.param('bias', named(nn.initializers.zeros_init(), 'classes'), (plan.outputs,))
    if settings.rule.name == 'float':
      whole, unit, effective = jnp.sign(weight), jnp.ones(()), weight
    elif self.bits > 2:
      unit = jnp.maximum(jnp.abs(weight).max(), 1e-9) / (2 ** (self.bits - 1) - 1)
      whole = jnp.floor(weight / unit + 0.5)
      effective = ternary.straight_through(weight, whole * unit)
    else:
      whole, scale, effective = _weights(self, weight, settings.rule, per_channel=False)
      unit = scale[0]
    mean = x if plan.by_place else x.mean((1, 2))
    result = (mean @ effective.astype(settings.dtype) + bias.astype(settings.dtype)).astype(jnp.float32)
    places = 1 if plan.by_place else x.shape[1] * x.shape[2]
    return result, fold.head(whole, unit, bias, max(settings.bits_in, 1), places)


def _weights(module: nn.Module, weight: Array, rule: _Rule, per_channel: bool = True) -> tuple[Array, Array, Array]:
  """Returns the signs, the scale, and the effective weight of a layer."""
  if rule.name == 'float':
    return weight, jnp.ones(1), weight
  term = 0.0
  if rule.name == 'learned':
    kept, term = ternary.learned(weight, module.param('threshold', named(nn.initializers.constant(0.7)), ()))
  elif rule.name == 'chosen':
    kept = module.variable('edge', 'kept', lambda: jnp.ones(weight.shape, bool)).value
  else:
    kept = rule.kept(weight)
  signs, scale = ternary.levels(jax.lax.stop_gradient(weight), kept, per_channel)
  return signs, scale, ternary.straight_through(weight, signs * scale) + term

"""Rules for operations with bodies: rematerialised regions, loops, branches, and functions with a derivative rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from ...program import Op, Program, jvp_program, rematerialise, scan_split, vary, varying
from .pipeline import pipeline
from .values import Strips, Value, common, laid, on_device, refuse

Run = Callable[[Program, list[Any]], list[Any]]


def _flat(
  program: Program, strips: list[Strips], run: Run, lives: Sequence[Array | None] = ()
) -> tuple[Callable, list[Strips]]:
  """Returns a function of arrays, and a list that every call of the function fills with its results' strips."""
  layouts: list[Strips] = []
  lives = lives or [None] * len(strips)

  def body(*xs):
    results = [on_device(v) for v in run(program, [Value(*v) for v in zip(xs, strips, lives, strict=True)])]
    layouts[:] = [v.strips for v in results]
    return [v.x for v in results]

  return body, layouts


def remat(op: Op, values: list[Value], run: Run) -> list[Value]:
  body, layouts = _flat(op.bodies[0], [v.strips for v in values], run, [v.live for v in values])
  xs = rematerialise(op, body)(*[v.x for v in values])
  return [Value(x, s) for x, s in zip(xs, layouts, strict=True)]


def scan(op: Op, values: list[Value], run: Run) -> list[Value]:
  """Runs a loop; carried values keep the strips that one turn gives them.

  A loop over layers that lie over the devices becomes a pipeline.
  """
  n_consts, n_carry = scan_split(op)
  whole = n_consts + n_carry
  if any(v.strips[0] is not None for v in values[whole:]):

    def stage(values: list[Value]) -> list[Value]:
      return loop(op, values, run, values[whole].x.shape[0])

    return pipeline(op, values, n_consts, n_carry, stage)
  return loop(op, values, run, op.params['length'])


def loop(op: Op, values: list[Value], run: Run, length: int) -> list[Value]:
  """Runs a scan of `length` turns."""
  (program,) = op.bodies
  n_consts, n_carry = scan_split(op)
  whole = n_consts + n_carry
  fixed = [v.strips for v in values[:n_consts]]
  sliced = [v.strips[1:] for v in values[whole:]]
  carry = list(values[n_consts:whole])
  while True:
    body, layouts = _flat(program, [*fixed, *(v.strips for v in carry), *sliced], run, [v.live for v in values])
    jax.eval_shape(body, *[v.x for v in (*values[:n_consts], *carry)], *[v.x[0] for v in values[whole:]])
    wanted = [
      common([v, v._replace(strips=s)], op) if len(s) == len(v.strips) else s
      for v, s in zip(carry, layouts[:n_carry], strict=True)
    ]
    if wanted == [v.strips for v in carry]:
      break
    carry = [Value(laid(v, s), s) for v, s in zip(carry, wanted, strict=True)]
  ends = list(layouts)

  def step(carry, xs):
    ys = body(*[v.x for v in values[:n_consts]], *carry, *xs)
    laid_out = [laid(Value(y, s), v.strips) for y, s, v in zip(ys[:n_carry], layouts[:n_carry], begun, strict=True)]
    return [vary(y, varying(v.x)) for y, v in zip(laid_out, begun, strict=True)], ys[n_carry:]

  begun = carry
  ends_vary = jax.eval_shape(lambda: step([v.x for v in begun], [v.x[0] for v in values[whole:]])[0])
  begun = [
    v._replace(x=vary(v.x, getattr(getattr(e, 'manual_axis_type', None), 'varying', frozenset())))
    for v, e in zip(begun, ends_vary, strict=True)
  ]
  p = op.params
  carried, ys = lax.scan(
    step, [v.x for v in begun], [v.x for v in values[whole:]], length, reverse=p['reverse'], unroll=p['unroll']
  )
  results = [Value(x, v.strips) for x, v in zip(carried, begun, strict=True)]
  return results + [Value(y, (None, *s)) for y, s in zip(ys, ends[n_carry:], strict=True)]


def cond(op: Op, values: list[Value], run: Run) -> list[Value]:
  """Runs a conditional; its results have the strips that all branches can give them."""
  if not values[0].whole:
    refuse(op, 'its predicate lies in strips')
  xs, strips = [v.x for v in values[1:]], [v.strips for v in values[1:]]
  bodies = [_flat(program, strips, run) for program in op.bodies]
  shapes = [jax.eval_shape(body, *xs) for body, _ in bodies]
  together = [
    common([Value(x, s) for x, s in zip(same, layout, strict=True)], op)
    for same, layout in zip(
      zip(*shapes, strict=True), zip(*(layouts for _, layouts in bodies), strict=True), strict=True
    )
  ]

  def branch(body, layouts):
    def run_it(*xs):
      ys = body(*xs)
      return [laid(Value(y, s), t) for y, s, t in zip(ys, layouts, together, strict=True)]

    return run_it

  ys = lax.switch(values[0].x, [branch(*b) for b in bodies], *xs)
  return [Value(y, s) for y, s in zip(ys, together, strict=True)]


def custom(op: Op, values: list[Value], run: Run) -> list[Value]:
  """Runs a function and its derivative rule in strips; results and tangents lie alike."""
  if op.name != 'custom_jvp_call':
    refuse(op, 'its backward pass (jax.custom_vjp) is a program of its own; write it with jax.custom_jvp')
  strips = [v.strips for v in values]
  body, layouts = _flat(op.bodies[0], strips, run)

  @jax.custom_jvp
  def own(*xs):
    return body(*xs)

  @own.defjvp
  def _(primals, tangents):
    moving = [t.dtype != jax.dtypes.float0 for t in tangents]
    rule, live = jvp_program(op, moving)
    inputs = [s for s in strips] + [s for s, m in zip(strips, moving, strict=True) if m]
    both, lie = _flat(rule, inputs, run)
    given = [*primals, *(t for t, m in zip(tangents, moving, strict=True) if m)]
    results = both(*given)
    n = len(op.outputs)
    layouts[:] = lie[:n]  # JAX calls the rule instead of the function where it differentiates at once
    ys, rest = results[:n], iter(zip(results[n:], lie[n:], strict=True))
    slopes = []
    for y, s, has in zip(ys, lie[:n], live, strict=True):
      slopes.append(laid(Value(*next(rest)), s) if has else jax.numpy.zeros_like(y))
    return ys, [vary(t, varying(y)) for t, y in zip(slopes, ys, strict=True)]

  return [Value(x, s) for x, s in zip(own(*[v.x for v in values]), layouts, strict=True)]


RULES = {'remat': remat, 'scan': scan, 'cond': cond, 'custom': custom}

"""The user's loss as a list of operations.

`trace` turns a function into a `Program`. Nested `jit`s are inlined (they change nothing but names). Every other
operation is kept as JAX traced it and bound again when the program is evaluated, so that custom derivative rules stay
in force. Loops, branches, rematerialised regions, shard_map and functions with their own derivative rules keep
`bodies`. Dead operations are dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.extend import core as jex

from .ops import Op, Program, Ref, has_mark
from .source import inside

_JIT = ('jit', 'pjit', 'closed_call', 'core_call')
# The kind of region of an operation with bodies, and the parameter that holds them, by JAX's names for the operation.
_REGIONS = {
  'checkpoint': ('remat', 'jaxpr'),
  'remat2': ('remat', 'jaxpr'),
  'remat': ('remat', 'jaxpr'),
  'scan': ('scan', 'jaxpr'),
  'cond': ('cond', 'branches'),
  'custom_jvp_call': ('custom', 'call_jaxpr'),
  'custom_vjp_call': ('custom', 'call_jaxpr'),
  'shard_map': ('shard_map', 'jaxpr'),
}


def trace(
  fn: Callable, *args: Any, operators: Mapping[str, Callable] = MappingProxyType({}), kept: Sequence[str] = ()
) -> tuple[Program, Any]:
  """Returns the program of `fn(*args)` (arrays or ShapeDtypeStructs) and the pytree of its outputs' shapes.

  operators: plain functions by name; their programs become the bodies of custom functions or primitives of that name.
  kept: the names of jitted functions that stay operations, with their programs as bodies.
  """
  meshes = []

  def noting_its_mesh(*args: Any) -> Any:  # the mesh depends on the arguments, too
    meshes.append(jax.sharding.get_abstract_mesh())
    return fn(*args)

  closed, shapes = jax.make_jaxpr(noting_its_mesh, return_shape=True)(*args)
  # A jaxpr traced under an outer transformation holds that transformation's tracers: it is used once, never cached.
  return _flatten(closed.jaxpr, closed.consts, itertools.count(), meshes[-1], operators, kept), shapes


def _flatten(
  jaxpr: Any,
  consts: Sequence[Any],
  fresh: itertools.count,
  mesh: Any,
  operators: Mapping[str, Callable] = MappingProxyType({}),
  kept: Sequence[str] = (),
) -> Program:
  table: dict[Any, Any] = {}
  values: dict[int, Any] = {}
  ops: list[Op] = []

  def define(var: Any) -> Ref:
    table[var] = Ref(next(fresh), tuple(var.aval.shape), var.aval.dtype)
    return table[var]

  def read(atom: Any) -> Any:
    return atom.val if isinstance(atom, jex.Literal) else table[atom]

  def visit(jaxpr: Any, outer: Any = None) -> None:
    for eqn in jaxpr.eqns:
      eqn = eqn if outer is None else inside(eqn, outer)
      inputs = tuple(read(v) for v in eqn.invars)
      if eqn.primitive.name in _JIT and eqn.params.get('name') not in kept:
        inner, inner_consts = _open(eqn.params.get('jaxpr', eqn.params.get('call_jaxpr')))
        bind_consts(inner, inner_consts)
        # A shared inner jaxpr may be visited again, which simply redefines its variables.
        table.update(zip(inner.invars, inputs, strict=True))
        visit(inner, eqn)
        table.update(zip(eqn.outvars, [read(v) for v in inner.outvars], strict=True))
        continue
      region, where = ('jit', 'jaxpr') if eqn.primitive.name in _JIT else _REGIONS.get(eqn.primitive.name, (None, ''))
      inner = () if region is None else eqn.params[where]
      plain = operators.get(_function_name(eqn))
      if plain is not None:
        region, inner = 'custom', jax.make_jaxpr(plain)(*(v.aval for v in eqn.invars))
      bodies = tuple(
        _flatten(*_open(j), fresh, mesh, operators, kept) for j in (inner if isinstance(inner, tuple) else (inner,))
      )
      own_mesh = _differs(eqn.ctx.cur_abstract_mesh, mesh)
      outputs = tuple(define(v) for v in eqn.outvars)
      ops.append(Op(eqn, inputs, outputs, region, bodies, own_mesh, plain is not None))

  def bind_consts(jaxpr: Any, consts: Sequence[Any]) -> None:
    for var, value in zip(jaxpr.constvars, consts, strict=True):
      values[define(var).index] = value

  bind_consts(jaxpr, consts)
  inputs = tuple(define(v) for v in jaxpr.invars)
  visit(jaxpr)
  return _live(Program(inputs, values, tuple(ops), tuple(read(v) for v in jaxpr.outvars)))


def _differs(mesh: Any, around: Any) -> bool:
  """Returns whether an operation was traced under a different mesh than the program around it.

  Where no mesh is set, a nested jit takes the mesh of its operands; that does not count as a different mesh.
  """
  taken = around.empty and not mesh.manual_axes
  return mesh != around and not taken


def _function_name(eqn: Any) -> str:
  """Returns the name of the Python function that a derivative rule belongs to, or else of the primitive."""
  body = eqn.params.get('call_jaxpr') if eqn.primitive.name.startswith('custom_') else None
  info = getattr(_open(body)[0], 'debug_info', None) if body is not None else None
  return info.func_src_info.split(' ')[0] if info is not None and info.func_src_info else eqn.primitive.name


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """Returns a jaxpr and its constants, whether it came closed or open (from jax 0.12 on, both are one class)."""
  return getattr(jaxpr, 'jaxpr', jaxpr), getattr(jaxpr, 'consts', ())


def _live(program: Program) -> Program:
  """Drops operations whose results nothing reads, but keeps observation marks and side effects."""
  needed = {v.index for v in program.outputs if isinstance(v, Ref)}
  kept = []
  for op in reversed(program.ops):
    if op.eqn.effects or has_mark(op) or any(v.index in needed for v in op.outputs):
      needed |= {v.index for v in op.inputs if isinstance(v, Ref)}
      kept.append(op)
  return program._replace(ops=tuple(reversed(kept)))


def jvp_program(op: Op, moving: Sequence[bool]) -> tuple[Program, list[bool]]:
  """Returns the derivative rule of a function that has its own (`custom_jvp_call`).

  Args:
    op: the call.
    moving: for each operand, whether it has a tangent.

  Returns:
    A program from the operands and then those tangents to the results and then their tangents; and, for each result,
    whether it has a tangent.
  """
  still = [not m for m in moving][op.params['num_consts'] :]
  mesh = op.eqn.outvars[0].aval.sharding.mesh  # the mesh that the call was traced under
  with jax.sharding.use_abstract_mesh(mesh):
    jaxpr, consts, zeros = op.params['jvp_jaxpr_fun'].call_wrapped(*still)
  return _flatten(jaxpr, consts, itertools.count(), mesh), [not z for z in zeros]

"""The user's loss as a list of operations: the one file that touches JAX's tracing machinery.

`trace` turns a function into a `Program`: nested `jit`s are inlined (they change nothing but names), every other
operation is kept as JAX traced it and bound again when the program is evaluated, so that custom derivative rules stay in
force. Loops, branches, rematerialised regions, shard_map and functions with derivative rules of their own keep `bodies`.
Dead operations are dropped.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex
from jax.extend import source_info_util

from .marks import observe_p

_JIT = ('jit', 'pjit', 'closed_call', 'core_call')
# What an operation with bodies does with them, by the names that JAX has given it, and where its bodies are.
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


class Ref(NamedTuple):
  """A value of the program: an index that is unique in the whole program, nested bodies included."""

  index: int
  shape: tuple[int, ...]
  dtype: Any


class Op(NamedTuple):
  """One operation; `inputs` are `Ref`s, or literals by value. A `region` ('remat', 'scan', 'cond'...) has `bodies`.

  own_mesh: whether it was traced under another mesh than the program around it.
  plain: whether its body is a plain function that the caller gave for it.
  """

  eqn: Any
  inputs: tuple[Any, ...]
  outputs: tuple[Ref, ...]
  region: str | None
  bodies: tuple[Program, ...]
  own_mesh: bool = False
  plain: bool = False

  @property
  def name(self) -> str:
    return self.eqn.primitive.name

  @property
  def params(self) -> dict[str, Any]:
    return self.eqn.params


class Program(NamedTuple):
  """`inputs`, then `ops` in order, give `outputs` (`Ref`s or literals). `consts` are values by index of their `Ref`."""

  inputs: tuple[Ref, ...]
  consts: dict[int, Any]
  ops: tuple[Op, ...]
  outputs: tuple[Any, ...]


def trace(
  fn: Callable, *args: Any, operators: Mapping[str, Callable] = MappingProxyType({}), kept: Sequence[str] = ()
) -> tuple[Program, Any]:
  """The program of `fn(*args)` (arrays or ShapeDtypeStructs) and the pytree of its outputs' shapes.

  operators: plain functions whose programs become the bodies of custom functions or primitives of these names.
  kept: names of jitted functions that stay operations, with their program as the body.
  """
  meshes = []

  def noting_its_mesh(*args: Any) -> Any:  # which follows from the arguments, too
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
      eqn = eqn if outer is None else _inside(eqn, outer)
      inputs = tuple(read(v) for v in eqn.invars)
      if eqn.primitive.name in _JIT and eqn.params.get('name') not in kept:
        inner, inner_consts = _open(eqn.params.get('jaxpr', eqn.params.get('call_jaxpr')))
        bind_consts(inner, inner_consts)
        # A shared inner jaxpr may be visited again: its variables are simply defined anew.
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
  """Whether an operation was traced under another mesh than the program around it.

  Nested jits take the mesh of their operands where none is set, which says nothing.
  """
  taken = around.empty and not mesh.manual_axes
  return mesh != around and not taken


def _inside(eqn: Any, outer: Any) -> Any:
  """An operation of a nested jit: in the scopes around that, and at its line where no line of its own is the user's."""
  own, around = eqn.source_info, outer.source_info
  traceback = own.traceback if _own_frames(own.traceback) else around.traceback
  return eqn.replace(source_info=own.replace(traceback=traceback, name_stack=around.name_stack + own.name_stack))


def _function_name(eqn: Any) -> str:
  """The name of the Python function that a derivative rule belongs to; of the primitive elsewhere."""
  body = eqn.params.get('call_jaxpr') if eqn.primitive.name.startswith('custom_') else None
  info = getattr(_open(body)[0], 'debug_info', None) if body is not None else None
  return info.func_src_info.split(' ')[0] if info is not None and info.func_src_info else eqn.primitive.name


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """A jaxpr and its constants, whether it came closed or open (the two are one class from jax 0.12 on)."""
  return getattr(jaxpr, 'jaxpr', jaxpr), getattr(jaxpr, 'consts', ())


def _live(program: Program) -> Program:
  """Drops the operations whose results nobody reads; observation marks and side effects stay."""
  needed = {v.index for v in program.outputs if isinstance(v, Ref)}
  kept = []
  for op in reversed(program.ops):
    if op.eqn.effects or has_mark(op) or any(v.index in needed for v in op.outputs):
      needed |= {v.index for v in op.inputs if isinstance(v, Ref)}
      kept.append(op)
  return program._replace(ops=tuple(reversed(kept)))


def has_mark(op: Op) -> bool:
  """Whether the operation is an observation mark or a region that holds one."""
  return op.name == observe_p.name or any(has_mark(inner) for body in op.bodies for inner in body.ops)


def bind(op: Op, *values: Any, **changed: Any) -> list[Any]:
  """The operation applied to other values, as JAX traced it but for parameters `changed`; its derivative rules included."""
  params = op.eqn.primitive.get_bind_params({**op.params, **changed})
  subfuns: Sequence[Any] = ()
  if isinstance(params, tuple):  # before jax 0.10: (functions, params)
    subfuns, params = params
  with at(op), context(op):
    out = op.eqn.primitive.bind(*subfuns, *values, **params)
  return list(out) if op.eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def context(op: Op) -> Iterator[None]:
  """Restores what JAX keeps of the contexts in which an operation was traced: compute_on, threefry, XLA metadata.

  The mesh is restored only where it is not the one of the program around the operation: a program may run inside of a
  shard_map that it was not traced in.
  """
  mesh = jax.sharding.get_abstract_mesh()
  with op.eqn.ctx.manager, contextlib.nullcontext() if op.own_mesh else jax.sharding.use_abstract_mesh(mesh):
    yield


@contextlib.contextmanager
def at(op: Op) -> Iterator[None]:
  """What is traced in it has the operation's line and scopes, so that profiles and compiled programs go on naming them."""
  source, scopes = op.eqn.source_info, source_info_util.current_name_stack()
  inside = str(scopes).endswith(str(source.name_stack))
  with source_info_util.user_context(source.traceback, name_stack=scopes if inside else scopes + source.name_stack):
    yield


def varying(x: Any) -> frozenset[str]:
  """The mesh axes along which a value differs inside of a shard_map; none elsewhere."""
  return getattr(getattr(jax.typeof(x), 'manual_axis_type', None), 'varying', frozenset())


def vary(x: Any, axes: frozenset[str]) -> Any:
  """`x`, said to differ along these mesh axes too; its cotangent is summed over them."""
  missing = tuple(sorted(axes - varying(x)))
  return jax.lax.pcast(x, missing, to='varying') if missing else x


def concrete(op: Op, values: Sequence[Any]) -> list[Any]:
  """The results of an operation on known numbers, now, even while an outer function is traced."""
  with jax.ensure_compile_time_eval():
    return bind(op, *values)


def is_known(value: Any) -> bool:
  """Whether a constant of a program is a number now, and not an outer transformation's tracer."""
  return not isinstance(value, jax.core.Tracer)


def layer_name(op: Op) -> str:
  """The scopes in which the operation was traced, 'ResNet/stage0_block0/conv_mid': flax names its layers so."""
  return str(op.eqn.source_info.name_stack)


def jvp_program(op: Op, moving: Sequence[bool]) -> tuple[Program, list[bool]]:
  """The derivative rule of a function that has its own (`custom_jvp_call`).

  Args:
    op: the call.
    moving: which of its operands have a tangent.

  Returns:
    A program of the operands, then those tangents, to the results, then their tangents; and which results have one.
  """
  still = [not m for m in moving][op.params['num_consts'] :]
  mesh = op.eqn.outvars[0].aval.sharding.mesh  # the one it was traced under
  with jax.sharding.use_abstract_mesh(mesh):
    jaxpr, consts, zeros = op.params['jvp_jaxpr_fun'].call_wrapped(*still)
  return _flatten(jaxpr, consts, itertools.count(), mesh), [not z for z in zeros]


def passes_gradient(op: Op, position: int) -> bool:
  """Whether the gradient of one operand is that of the only result, untouched, by the rule of the function itself."""
  primals = [jax.ShapeDtypeStruct(v.shape, v.dtype) if isinstance(v, Ref) else v for v in op.inputs]
  value = primals[position]
  if value.shape != op.outputs[0].shape or value.dtype != op.outputs[0].dtype:
    return False

  def pulled(slope: Any, *values: Any) -> Any:
    full = list(values)
    _, pull = jax.vjp(lambda x: bind(op, *full[:position], x, *full[position + 1 :])[0], full[position])
    return pull(slope)[0]

  try:
    body, _ = trace(pulled, value, *primals)
  except (NameError, TypeError, ValueError):  # a rule that cannot be read out of its place, as one with collectives
    return False
  return body.outputs[0] is body.inputs[0]


def source_line(op: Op) -> str:
  """'file.py:12', the user's line that caused the operation: the innermost frame outside of installed packages."""
  traceback = op.eqn.source_info.traceback
  own = _own_frames(traceback)
  outside_jax = [f for f in (traceback.frames if traceback is not None else ()) if not f.file_name.startswith(_JAX)]
  for frame in own or outside_jax:
    return f'{os.path.relpath(frame.file_name) if own else frame.file_name}:{frame.line_num}'
  return 'an unknown line'


def _own_frames(traceback: Any) -> list[Any]:
  """The frames outside of installed packages and of what reads programs."""
  frames = traceback.frames if traceback is not None else ()
  return [f for f in frames if not f.file_name.startswith((_JAX, *_READERS, *_INSTALLED))]


_JAX = os.path.dirname(jax.__file__)
_PACKAGES = os.path.dirname(os.path.dirname(__file__))
_READERS = tuple(os.path.join(_PACKAGES, name, '') for name in ('program', 'kron', 'parallel'))
_INSTALLED = tuple({sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), sysconfig.get_path('stdlib')})

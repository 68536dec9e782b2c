"""The parts of a program: values, operations, and the bodies of operations."""

from __future__ import annotations

from typing import Any, NamedTuple

from .marks import observe_p


class Ref(NamedTuple):
  """A value of the program: an index that is unique in the whole program, nested bodies included."""

  index: int
  shape: tuple[int, ...]
  dtype: Any


Operand = Any  # an array, or a literal of a program


class Op(NamedTuple):
  """One operation; `inputs` are `Ref`s, or literals by value. A `region` ('remat', 'scan', 'cond'...) has `bodies`.

  own_mesh: whether the operation was traced under a different mesh than the program around it.
  plain: whether the body is a plain function that the caller gave for the operation.
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
  """A list of operations: `ops` turn `inputs` into `outputs` (`Ref`s or literals). `consts` are by `Ref` index."""

  inputs: tuple[Ref, ...]
  consts: dict[int, Any]
  ops: tuple[Op, ...]
  outputs: tuple[Any, ...]


def has_mark(op: Op) -> bool:
  """Returns whether the operation is an observation mark or a region that holds one."""
  return op.name == observe_p.name or any(has_mark(inner) for body in op.bodies for inner in body.ops)

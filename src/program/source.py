"""Where an operation comes from: the user's line and the scopes around it."""

from __future__ import annotations

import os
import sysconfig
from typing import Any

import jax

from .ops import Op

_JAX = os.path.dirname(jax.__file__)
_PACKAGES = os.path.dirname(os.path.dirname(__file__))
_READERS = tuple(os.path.join(_PACKAGES, name, '') for name in ('program', 'kron', 'parallel'))
_INSTALLED = tuple({sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), sysconfig.get_path('stdlib')})


def layer_name(op: Op) -> str:
  """The scopes in which the operation was traced, 'ResNet/stage0_block0/conv_mid': flax names its layers so."""
  return str(op.eqn.source_info.name_stack)


def source_line(op: Op) -> str:
  """'file.py:12', the user's line that caused the operation: the innermost frame outside of installed packages."""
  traceback = op.eqn.source_info.traceback
  own = _own_frames(traceback)
  outside_jax = [f for f in (traceback.frames if traceback is not None else ()) if not f.file_name.startswith(_JAX)]
  for frame in own or outside_jax:
    return f'{os.path.relpath(frame.file_name) if own else frame.file_name}:{frame.line_num}'
  return 'an unknown line'


def inside(eqn: Any, outer: Any) -> Any:
  """An operation of a nested jit: in the scopes around that, and at its line where no line of its own is the user's."""
  own, around = eqn.source_info, outer.source_info
  traceback = own.traceback if _own_frames(own.traceback) else around.traceback
  return eqn.replace(source_info=own.replace(traceback=traceback, name_stack=around.name_stack + own.name_stack))


def _own_frames(traceback: Any) -> list[Any]:
  """The frames outside of installed packages and of what reads programs."""
  frames = traceback.frames if traceback is not None else ()
  return [f for f in frames if not f.file_name.startswith((_JAX, *_READERS, *_INSTALLED))]

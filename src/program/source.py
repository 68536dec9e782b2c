"""The origin of an operation: the user's line and the scopes around it."""

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
  """Returns the operation's scopes, such as 'ResNet/stage0_block0/conv_mid', which is how flax names its layers."""
  return str(op.eqn.source_info.name_stack)


def source_line(op: Op) -> str:
  """Returns the user's line that caused the operation, 'file.py:12': the innermost frame not in installed packages."""
  traceback = op.eqn.source_info.traceback
  frames = _own_frames(traceback)
  outside_jax = [f for f in (traceback.frames if traceback is not None else ()) if not f.file_name.startswith(_JAX)]
  for frame in frames or outside_jax:
    return f'{os.path.relpath(frame.file_name) if frames else frame.file_name}:{frame.line_num}'
  return 'an unknown line'


def inside(eqn: Any, outer: Any) -> Any:
  """Gives an operation of a nested jit the outer scopes, and the outer line if no line of it is the user's."""
  inner, around = eqn.source_info, outer.source_info
  traceback = inner.traceback if _own_frames(inner.traceback) else around.traceback
  return eqn.replace(source_info=inner.replace(traceback=traceback, name_stack=around.name_stack + inner.name_stack))


def _own_frames(traceback: Any) -> list[Any]:
  """Returns the frames outside of installed packages and of the packages that read programs."""
  frames = traceback.frames if traceback is not None else ()
  return [f for f in frames if not f.file_name.startswith((_JAX, *_READERS, *_INSTALLED))]

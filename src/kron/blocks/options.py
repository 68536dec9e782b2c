"""Holds the options of `curvature`, which its caller chooses by patterns on the parameters' names."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import CurvatureError
from ..measuring.shards import Shards
from ..operators import APPROXIMATIONS, SHARING

FALLBACKS = ('gradient', 'diagonal')
OVERSIZE = ('diagonal', 'blocks')


class Options(NamedTuple):
  """The options of `curvature`, which explains the choices. Patterns are those of fnmatch."""

  fisher: str
  has_aux: bool
  examples: int | Callable[..., Any] | None
  operators: Mapping[str, Callable]
  fallback: Mapping[str, str]
  sharing: Mapping[str, str]
  approximation: Mapping[str, str]
  max_factor: int
  oversize: str
  shards: Shards = Shards()
  blocks: Mapping[str, Mapping[str, int]] = {}

  def check(self, names: Sequence[str]) -> None:
    """Raises CurvatureError for a choice that is unknown or matches no parameter."""
    for what, chosen, known in (
      ('fallback', self.fallback, FALLBACKS),
      ('sharing', self.sharing, SHARING),
      ('approximation', self.approximation, APPROXIMATIONS),
    ):
      for pattern, choice in chosen.items():
        if choice not in known:
          raise CurvatureError(f'{what} {choice!r} for {pattern!r} is unknown; choose from {", ".join(known)}')
        if not any(fnmatch.fnmatch(name, pattern) for name in names):
          raise CurvatureError(f'{what} for {pattern!r} matches no parameter; there are {", ".join(names[:8])} ...')
    for pattern, parts in self.blocks.items():
      if set(parts) - {'A', 'G'} or any(not isinstance(n, int) or n < 1 for n in parts.values()):
        raise CurvatureError(
          f"blocks={{{pattern!r}: {dict(parts)}}}: name 'A', 'G' or both, each with a number of blocks"
        )
      if not any(fnmatch.fnmatch(name, pattern) for name in names):
        raise CurvatureError(f'blocks for {pattern!r} matches no parameter; there are {", ".join(names[:8])} ...')
    if self.oversize not in OVERSIZE:
      raise CurvatureError(f'oversize={self.oversize!r} is unknown; choose from {", ".join(OVERSIZE)}')


def chosen(patterns: Mapping[str, Any], name: str) -> Any:
  """Returns the choice of the first pattern that matches the name, or None."""
  return next((value for pattern, value in patterns.items() if fnmatch.fnmatch(name, pattern)), None)

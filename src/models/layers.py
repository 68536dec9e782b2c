"""Initialisers that carry the names of a parameter's logical axes."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn


def named(init: Callable, *axes: str | None) -> Callable:
  return nn.with_logical_partitioning(init, axes)


def dense(features: int, names: tuple[str | None, str | None], init: Callable, **kwargs) -> nn.Dense:
  """A Dense layer whose kernel has these logical axes and whose bias has the last."""
  return nn.Dense(
    features, kernel_init=named(init, *names), bias_init=named(nn.initializers.zeros_init(), names[-1]), **kwargs
  )

"""Means over the examples of a batch that count; those that fill up a last batch have mask 0."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Num


def mean(values: Num[Array, ' b'], batch: dict[str, Array]) -> Float[Array, '']:
  """Returns the mean over the examples of the batch that count."""
  if 'mask' not in batch:
    return values.mean()
  return (values * batch['mask']).sum() / batch['mask'].sum()


def counted(batch: dict[str, Array]) -> Bool[Array, ' b'] | None:
  """Returns which examples of the batch count, as a mask for the marked outputs; None if all do."""
  return batch['mask'] > 0 if 'mask' in batch else None

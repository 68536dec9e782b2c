"""Differentiable augmentation of the images that a discriminator sees, real or not.

It follows DiffAugment (Zhao et al. 2020, arXiv:2006.10738). Each function takes (images, key).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Images = Float[Array, 'b h w c']


def colour(x: Images, key: PRNGKeyArray) -> Images:
  """Changes brightness, then saturation if there are colours, then contrast.

  Brightness changes by up to a quarter of the range from black to white. (The paper moves images in [-1, 1] by up to a
  half; these are in [0, 1].)
  """
  brightness, saturation, contrast = jax.random.uniform(key, (3, len(x), 1, 1, 1))
  x = x + (brightness - 0.5) / 2
  grey = x.mean(3, keepdims=True)
  x = (x - grey) * (2 * saturation) + grey if x.shape[3] > 1 else x
  mean = x.mean((1, 2, 3), keepdims=True)
  return (x - mean) * (contrast + 0.5) + mean


def translation(x: Images, key: PRNGKeyArray) -> Images:
  """Shifts images by up to an eighth of their side and fills the gap with zeros."""
  b, h, w, _ = x.shape
  far = jnp.array([h, w]) // 8
  move = jax.random.randint(key, (2, b, 1), -far[:, None, None], far[:, None, None] + 1)
  rows, columns = jnp.arange(h) + move[0], jnp.arange(w) + move[1]
  inside = lambda at, n: (at >= 0) & (at < n)  # noqa: E731
  there = inside(rows, h)[:, :, None, None] & inside(columns, w)[:, None, :, None]
  moved = jnp.take_along_axis(x, jnp.clip(rows, 0, h - 1)[:, :, None, None], 1)
  moved = jnp.take_along_axis(moved, jnp.clip(columns, 0, w - 1)[:, None, :, None], 2)
  return jnp.where(there, moved, 0)


def cutout(x: Images, key: PRNGKeyArray) -> Images:
  """Sets a square of half the side to zero; its centre may be anywhere."""
  b, h, w, _ = x.shape
  centre = jax.random.uniform(key, (2, b, 1)) * jnp.array([h, w])[:, None, None]
  cut = lambda at, n: jnp.abs(jnp.arange(n) + 0.5 - at) < n / 4  # noqa: E731
  hidden = cut(centre[0], h)[:, :, None, None] & cut(centre[1], w)[:, None, :, None]
  return jnp.where(hidden, 0, x)


POLICIES: dict[str, Callable[[Images, PRNGKeyArray], Images]] = {
  'colour': colour,
  'translation': translation,
  'cutout': cutout,
}
"""Maps the name of each augmentation to its function of (images, key), which returns the changed images.

'colour' changes brightness, saturation and contrast. 'translation' shifts images by up to an eighth of their side.
'cutout' sets a square of half the side to zero.
"""


def augment(x: Images, key: PRNGKeyArray, policy: tuple[str, ...]) -> Images:
  """Returns images after all augmentations of a policy, applied one after another.

  Each image gets its own random change. Gradients flow through it (DiffAugment, Zhao et al. 2020, arXiv:2006.10738).

  Args:
    x: images in [0, 1], (b, h, w, c).
    key: the key of the random changes.
    policy: names of `POLICIES`, in order; with none the images stay as they are.

  Raises:
    ValueError: a name is unknown.
  """
  for number, name in enumerate(policy):
    if name not in POLICIES:
      raise ValueError(f'augmentation {name!r} is unknown; choose from {", ".join(POLICIES)}')
    x = POLICIES[name](x, jax.random.fold_in(key, number))
  return x

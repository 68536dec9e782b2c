"""The shots into which a film is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from ..extras import load


class Shot(NamedTuple):
  """A shot: the frames of a film from number `first` on."""

  first: int
  frames: list[UInt8[np.ndarray, 'h w 3']]


def shots(
  frames: Iterable[UInt8[np.ndarray, 'h w 3']],
  rate: float,
  *,
  threshold: float = 2.0,
  shortest: float = 0.5,
  longest: float = 20.0,
) -> Iterator[Shot]:
  """Yields the shots of a film one after another; only about one shot's frames wait in memory.

  Cuts are those of PySceneDetect's adaptive detector: changes of hue, saturation and brightness that are `threshold`
  times those of the frames around them. Dissolves are not found; fades are, where their change is abrupt enough.

  Args:
    frames: RGB frames of the film.
    rate: frames in a second.
    threshold: ratio of a cut's change to the change around it.
    shortest: seconds between cuts.
    longest: seconds after which a shot is ended without a cut.

  Raises:
    MissingExtra: PySceneDetect is not installed.
  """
  FrameTimecode = load('video', 'scenedetect.common').FrameTimecode
  AdaptiveDetector = load('video', 'scenedetect.detectors').AdaptiveDetector
  detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=max(1, round(shortest * rate)))
  limit = max(2, round(longest * rate))
  first, waiting = 0, []
  for number, frame in enumerate(frames):
    waiting.append(frame)
    for cut in detector.process_frame(FrameTimecode(number, rate), np.ascontiguousarray(frame[..., ::-1])):
      if cut.frame_num > first:
        yield Shot(first, waiting[: cut.frame_num - first])
        first, waiting = cut.frame_num, waiting[cut.frame_num - first :]
    # The detector reports a cut up to two frames late, so those frames stay.
    if len(waiting) >= limit + detector.window_width:
      yield Shot(first, waiting[:limit])
      first, waiting = first + limit, waiting[limit:]
  if waiting:
    yield Shot(first, waiting)

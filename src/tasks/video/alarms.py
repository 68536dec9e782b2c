"""Measures of alarms: scores of frames against the times when an alarm is right. Arrays are (scene, time)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer
from sklearn.metrics import average_precision_score, roc_auc_score

Scores = Float[np.ndarray, 's t']
Labels = Integer[np.ndarray, 's t']


class Detection(NamedTuple):
  """The detection of events at one threshold.

  found: the share of events that are detected. delay: the median delay over all events in seconds (missed: inf).
  """

  threshold: float
  found: float
  delay: float


class Anticipation(NamedTuple):
  """The anticipation of accidents at one threshold.

  recall: the share of accidents that are foreseen. seconds: the mean time before them. an_hour: false alarms per hour.
  """

  threshold: float
  recall: float
  seconds: float
  an_hour: float


def frame_auc(label: Labels, score: Scores) -> float:
  """Returns the area under the ROC curve over all frames."""
  return float(roc_auc_score(label.ravel(), score.ravel()))


def scene_precision(label: Labels, score: Scores) -> float:
  """Returns the average precision of scenes by their highest score (Chan et al. 2016, on DAD)."""
  return float(average_precision_score(label.any(1), score.max(1)))


def scene_auc(label: Labels, score: Scores) -> float:
  return float(roc_auc_score(label.any(1), score.max(1)))


def detection(label: Labels, score: Scores, false_rate: float, rate: float) -> Detection:
  """Measures detection with alarms at `false_rate` of the frames without an event.

  An event is found if there is an alarm while it lasts.

  Args:
    label: 1 at the event's frames, in at most one run per scene.
    score: the scores of frames; an alarm is a score above the threshold.
    false_rate: the share of frames.
    rate: the number of frames per second.
  """
  normal = np.sort(score[label == 0])[::-1]
  threshold = float(normal[min(int(false_rate * len(normal)), len(normal) - 1)])
  events = label.any(1)
  alarms = (score > threshold) & (label == 1)
  first = np.where(alarms.any(1), alarms.argmax(1) - label.argmax(1), np.inf)[events] / rate
  return Detection(threshold, float(np.isfinite(first).mean()), float(np.median(first)))


def anticipation(label: Labels, score: Scores, recall: float, rate: float, after: float) -> Anticipation:
  """Measures anticipation at the highest threshold that gives the share `recall` of the accidents an alarm.

  The alarm may come at any time of the accident's scene (as on DAD).

  Args:
    label: contains a 1 in the scenes before an accident.
    score: the scores of frames; an alarm is a score of the threshold or more.
    recall: the share of accidents.
    rate: the number of frames per second.
    after: the seconds from a scene's first column to its accident.
  """
  accident = label.any(1)
  highest = np.sort(score[accident].max(1))[::-1]
  threshold = float(highest[int(np.ceil(recall * len(highest))) - 1])
  alarm = score >= threshold
  caught = alarm & accident[:, None]
  seconds = after - alarm[caught.any(1)].argmax(1) / rate
  quiet = alarm[~accident]
  hours = quiet.size / rate / 3600
  return Anticipation(threshold, float(caught.any(1)[accident].mean()), float(seconds.mean()), _episodes(quiet) / hours)


def _episodes(alarm: Bool[np.ndarray, 's t']) -> int:
  """Counts how often an alarm begins; an alarm that goes on counts once."""
  return int(alarm[:, 0].sum() + (alarm[:, 1:] & ~alarm[:, :-1]).sum())


def difference(measure, label: Labels, ours: Scores, theirs: Scores, draws: int = 500) -> tuple[float, float]:
  """Returns the 95 % interval of measure(ours) - measure(theirs), by a paired bootstrap over the scenes."""
  rng, scores = np.random.default_rng(0), []
  while len(scores) < draws:
    rows = rng.integers(0, len(label), len(label))
    if 0 < label[rows].any(1).mean() < 1:
      scores.append(measure(label[rows], ours[rows]) - measure(label[rows], theirs[rows]))
  low, high = np.quantile(scores, [0.025, 0.975])
  return float(low), float(high)

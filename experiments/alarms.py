"""How good alarms are: scores of frames against when an alarm is right. Arrays are (scene, time)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer
from sklearn.metrics import average_precision_score, roc_auc_score

Scores = Float[np.ndarray, 's t']
Labels = Integer[np.ndarray, 's t']


class Detection(NamedTuple):
  """Of events at one threshold: the share that is found, and the median delay of all in seconds (missed: inf)."""

  threshold: float
  found: float
  delay: float


class Anticipation(NamedTuple):
  """At the threshold with which so many accidents are foreseen: seconds before them on average, false alarms an hour."""

  threshold: float
  recall: float
  seconds: float
  an_hour: float


def frame_auc(label: Labels, score: Scores) -> float:
  """The area under the ROC curve of all frames together."""
  return float(roc_auc_score(label.ravel(), score.ravel()))


def scene_precision(label: Labels, score: Scores) -> float:
  """Average precision of scenes by their highest score (Chan et al. 2016, on DAD)."""
  return float(average_precision_score(label.any(1), score.max(1)))


def scene_auc(label: Labels, score: Scores) -> float:
  return float(roc_auc_score(label.any(1), score.max(1)))


def detection(label: Labels, score: Scores, false_rate: float, rate: float) -> Detection:
  """With alarms at `false_rate` of the frames without an event; an event is found by an alarm while it lasts.

  Args:
    label: 1 at the event's frames, one run in each scene at most.
    score: of frames; an alarm is a score above the threshold.
    false_rate: share of frames.
    rate: frames in a second.
  """
  normal = np.sort(score[label == 0])[::-1]
  threshold = float(normal[min(int(false_rate * len(normal)), len(normal) - 1)])
  events = label.any(1)
  alarms = (score > threshold) & (label == 1)
  first = np.where(alarms.any(1), alarms.argmax(1) - label.argmax(1), np.inf)[events] / rate
  return Detection(threshold, float(np.isfinite(first).mean()), float(np.median(first)))


def anticipation(label: Labels, score: Scores, recall: float, rate: float, after: float) -> Anticipation:
  """At the highest threshold by which that share of the accidents gets an alarm, at any time of its scene (as on DAD).

  Args:
    label: with a 1 in the scenes before an accident.
    score: of frames; an alarm is a score of the threshold or more.
    recall: share of accidents.
    rate: frames in a second.
    after: seconds from a scene's first column to its accident.
  """
  accident = label.any(1)
  highest = np.sort(score[accident].max(1))[::-1]
  threshold = float(highest[int(np.ceil(recall * len(highest))) - 1])
  alarm = score >= threshold
  found = alarm & accident[:, None]
  seconds = after - alarm[found.any(1)].argmax(1) / rate
  quiet = alarm[~accident]
  hours = quiet.size / rate / 3600
  return Anticipation(threshold, float(found.any(1)[accident].mean()), float(seconds.mean()), _episodes(quiet) / hours)


def _episodes(alarm: Bool[np.ndarray, 's t']) -> int:
  """How often an alarm begins: one that goes on is one."""
  return int(alarm[:, 0].sum() + (alarm[:, 1:] & ~alarm[:, :-1]).sum())


def difference(measure, label: Labels, ours: Scores, theirs: Scores, draws: int = 500) -> tuple[float, float]:
  """The 95 % interval of measure(ours) - measure(theirs) over scenes drawn anew (a paired bootstrap)."""
  rng, found = np.random.default_rng(0), []
  while len(found) < draws:
    rows = rng.integers(0, len(label), len(label))
    if 0 < label[rows].any(1).mean() < 1:
      found.append(measure(label[rows], ours[rows]) - measure(label[rows], theirs[rows]))
  low, high = np.quantile(found, [0.025, 0.975])
  return float(low), float(high)

"""Trains a network to raise alarms on scenes, and scores it frame by frame against a detector without learning.

python scripts/alarms.py --config=anomalies --workdir=runs/anomalies
python scripts/alarms.py --config=accidents --workdir=runs/accidents

A network that the work folder already holds is not trained again. Scores are for the test scenes, which training and
its evaluations have not seen. The score of a frame is the network's probability for the clip that ends there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime.launch import launch  # isort: skip  (sets the environment before JAX loads)

import jax
import matplotlib
import numpy as np
from absl import flags

from kronmesh import data, files
from kronmesh.commands.palette import OTHERS
from kronmesh.data import dashcam
from kronmesh.tasks.video import alarms, baselines
from kronmesh.train import jsonfile
from kronmesh.train.build import Run, build
from kronmesh.train.checkpoints import load_export
from kronmesh.train.errors import ConfigError
from kronmesh.train.loop import train
from kronmesh.train.reporting.tables import columns

matplotlib.use('Agg')
import matplotlib.pyplot as plt

FALSE_RATE = flags.DEFINE_float('false_rate', 0.01, 'Share of normal frames with an alarm, for delays.', 0.0, 1.0)
RECALL = flags.DEFINE_float('recall', 0.8, 'Share of accidents with an alarm, for the time before them.', 0.0, 1.0)
BASELINES = {
  'surveillance': ('difference of frames', baselines.frame_difference),
  'dashcam': ('expansion', baselines.expansion),
}


def probabilities(run: Run, variables: Any, clips: Any, batch: int = 100) -> np.ndarray:
  """Returns the probability of the second class for each clip."""
  of = jax.jit(lambda x: jax.nn.softmax(run.task.model.apply(variables, x).astype('float32'))[:, 1])
  n, scores = len(clips), []
  for first in range(0, n, batch):
    rows = np.minimum(np.arange(first, first + batch), n - 1)  # one shape for all batches
    scores.append(np.asarray(of(clips[rows])))
  return np.concatenate(scores)[:n]


def measures(name: str, label: np.ndarray, score: np.ndarray, rate: float, first: int) -> dict[str, float]:
  """Returns the measures of one detector on a data set. first: the frame of the first score."""
  scores = {'frame AUC': alarms.frame_auc(label, score), 'scene AUC': alarms.scene_auc(label, score)}
  if name == 'surveillance':
    at = alarms.detection(label, score, FALSE_RATE.value, rate)
    return {**scores, 'found': at.found, 'median delay, s': at.delay}
  at = alarms.anticipation(label, score, RECALL.value, rate, dashcam.END - first / rate)
  average = alarms.scene_precision(label, score)
  return {
    **scores,
    'AP': average,
    'recall': at.recall,
    'seconds before': at.seconds,
    'false alarms an hour': at.an_hour,
  }


def by_kind(scenes: data.Scenes, label: np.ndarray, score: np.ndarray) -> dict[str, float]:
  """Returns the frame AUC of each kind of event against the normal scenes, or against its twin."""
  results = {}
  for number, kind in enumerate(scenes.kinds):
    event = kind.removesuffix('_collision')
    others = [i for i, k in enumerate(scenes.kinds) if k in ('normal', f'{event}_passes')]
    if number not in others and not kind.endswith('_passes'):
      rows = (scenes.kind == number) | np.isin(scenes.kind, others)
      results[event] = alarms.frame_auc(label[rows], score[rows])
  return results


def picture(scenes: data.Scenes, scores: dict[str, np.ndarray], first: int, path: Path) -> None:
  """Draws a row for each kind of event: five frames of a scene, and both detectors' scores over time.

  Each detector's scores are divided by their maximum.
  """
  chosen = [int(np.flatnonzero(scenes.kind == k)[0]) for k in range(len(scenes.kinds)) if (scenes.kind == k).any()]
  figure, axes = plt.subplots(
    len(chosen), 6, figsize=(13, 1.55 * len(chosen)), layout='constrained', width_ratios=[1] * 5 + [2.4]
  )
  time = np.arange(first, scenes.frames.shape[1])
  for row, scene in zip(axes, chosen, strict=True):
    on = np.flatnonzero(scenes.label[scene])
    centre = on[len(on) // 2] if len(on) else scenes.frames.shape[1] // 2
    shown = np.clip(np.linspace(centre - 12, centre + 12, 5).astype(int), 0, scenes.frames.shape[1] - 1)
    for axis, t in zip(row, shown, strict=False):
      axis.imshow(scenes.frames[scene, t], cmap='gray', vmin=0, vmax=255)
      axis.set_xticks([])
      axis.set_yticks([])
      axis.set_title(f'{t / scenes.rate:.1f} s', fontsize=7, pad=2)
    row[0].set_ylabel(scenes.kinds[scenes.kind[scene]].replace('_', '\n'), fontsize=8)
    for colour, (name, score) in zip(OTHERS, scores.items(), strict=False):
      row[-1].plot(time / scenes.rate, score[scene] / score.max(), label=name, color=colour, linewidth=1.2)
    row[-1].fill_between(
      time / scenes.rate, scenes.label[scene, first:], step='mid', color='grey', alpha=0.25, linewidth=0
    )
    row[-1].set_ylim(0, 1.05)
    row[-1].set_yticks([0, 1])
    row[-1].set_ylabel('score / maximum', fontsize=7)
    row[-1].tick_params(labelsize=7)
  axes[0, -1].legend(frameon=False, fontsize=7)
  axes[-1, -1].set_xlabel('seconds; grey: an alarm is right', fontsize=8)
  with files.replacing(path) as file:
    figure.savefig(file, dpi=100, format='png')
  plt.close(figure)


def verdict(low: float, high: float) -> str:
  """Describes a 95 % interval of the network's lead in words."""
  if low <= 0 <= high:
    return f'no difference is shown at 95 % ({low:.3g} to {high:.3g})'
  word, near, far = ('ahead', low, high) if low > 0 else ('behind', -high, -low)
  return f'the network is {word} by {near:.3g} to {far:.3g} (95 %, scenes drawn anew)'


def main(config: Any, workdir: str) -> None:
  settings, folder = config.data, Path(workdir)
  if settings.name not in BASELINES:
    raise ConfigError(
      f'config.data.name={settings.name!r} has no scenes; use experiments/configs/anomalies.py or accidents.py'
    )
  run = build(config)
  train(config, folder, run=run)
  variables, _ = load_export(folder / 'export')
  scenes = data.load_scenes(settings.name, 'test', folder=settings.folder, source=settings.source)
  clips = data.windows(data.shrunken(scenes, settings.short_side), settings.frames, settings.every)
  first = (settings.frames - 1) * settings.every
  label = scenes.label[:, first:].astype(np.int64)
  word, baseline = BASELINES[settings.name]
  scores = {
    config.model.name: probabilities(run, variables, clips.inputs).reshape(label.shape).astype(np.float64),
    word: np.stack([baseline(f) for f in scenes.frames])[:, first:],
  }
  told = {name: measures(settings.name, label, score, scenes.rate, first) for name, score in scores.items()}
  kinds = {name: by_kind(scenes, label, score) for name, score in scores.items()}
  ours, theirs = scores.values()
  gains = {
    'frame AUC': alarms.difference(alarms.frame_auc, label, ours, theirs),
    'scene AUC': alarms.difference(alarms.scene_auc, label, ours, theirs),
  }
  heads = ('', *next(iter(told.values())))
  text = columns(heads, [(name, *(f'{v:.3g}' for v in values.values())) for name, values in told.items()])
  text += '\n\nframe AUC by kind\n'
  text += columns(('', *next(iter(kinds.values()))), [(n, *(f'{v:.3g}' for v in k.values())) for n, k in kinds.items()])
  text += '\n\n' + '\n'.join(f'{name}: {verdict(*ends)}' for name, ends in gains.items())
  files.write(folder / 'alarms.txt', text + '\n')
  files.write(folder / 'alarms.json', jsonfile.dumps({'measures': told, 'kinds': kinds, 'ahead': gains}, indent=1))
  picture(scenes, scores, first, folder / 'alarms.png')
  print(f'\n{text}\n')
  if settings.name == 'surveillance':
    print(f'found and delay: with alarms at {FALSE_RATE.value:.1%} of normal frames; a delay of inf: most are missed')
  print(f'{len(scenes.frames)} scenes; picture {folder / "alarms.png"}, numbers {folder / "alarms.json"}')


if __name__ == '__main__':
  launch(main, default_workdir='runs/alarms')

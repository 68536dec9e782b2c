"""Measures search for shots by example, with a network of clips and with colours, in films whose shots are known.

python scripts/retrieval.py --run=runs/moving --workdir=runs/retrieval

The films show garments of Fashion-MNIST's test set in motion, each shot in a random colour, and are written as
files. A topic is a motion, given by three shots of other films. As in scripts/find.py, files are decoded and cut into
shots where the picture changes. The script leaves run files and judgements, complete and sampled in strata, in TREC's
formats.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

import numpy as np
from absl import flags

from kronmesh import data, files
from kronmesh.data.builders import FASHION_MNIST_DEBIAN, FashionMnistIdx, idx_entries, read_idx
from kronmesh.data.moving import MOTIONS, moving
from kronmesh.tasks.video import retrieval, trec
from kronmesh.train import jsonfile
from kronmesh.train.errors import ConfigError
from kronmesh.train.reporting.tables import columns

RUN = flags.DEFINE_string('run', None, 'Work folder of a finished run on moving_fashion_mnist.', required=True)
SOURCE = flags.DEFINE_string('source', FASHION_MNIST_DEBIAN, "The folder with Fashion-MNIST's IDX files.")
FILMS = flags.DEFINE_integer('films', 30, 'How many films are searched.', lower_bound=1)
WORKDIR = launch.define_folder('workdir', 'runs/retrieval', 'Folder for films, run files and judgements.')
SHOTS, RATE, ENLARGED = 12, 10.0, 4
EXAMPLES = 3  # shots that give a topic
DEEP, SHARE = 20, 0.25  # all are judged to this rank of either run, and this share of the rest


def write_films(folder: Path, count: int, seed: int) -> dict[str, list[tuple[int, int]]]:
  """Writes films, and returns film -> (first frame, motion) for each of its shots.

  Existing files are kept, because a seed always gives the same films.
  """
  garments, truth = read_idx(Path(SOURCE.value) / FashionMnistIdx.images_of('test')), {}
  folder.mkdir(parents=True, exist_ok=True)
  for number in range(count):
    rng, frames, rows = np.random.default_rng((seed, number)), [], []
    for _ in range(SHOTS):
      motion, length = int(rng.integers(len(MOTIONS))), int(rng.integers(12, 25))
      grey = moving(garments[rng.integers(len(garments))], motion, rng, length)
      rows.append((sum(len(f) for f in frames), motion))
      frames.append((grey * rng.uniform(0.5, 1, 3)).astype(np.uint8))
    path = folder / f'film{number:03}.mp4'
    truth[path.name] = rows
    if not path.exists():
      data.write_video(path, np.concatenate(frames).repeat(ENLARGED, 1).repeat(ENLARGED, 2), rate=RATE)
  return truth


def matched(entry: retrieval.Entry, rows: list[tuple[int, int]]) -> int:
  """Returns the number of the film's true shot that shares the most frames with a detected one."""
  begins, ends = entry.begins * RATE, entry.ends * RATE
  firsts = [first for first, _ in rows]
  shared = [min(ends, b) - max(begins, a) for a, b in zip(firsts, [*firsts[1:], np.inf], strict=True)]
  return int(np.argmax(shared))


def topics(embedding: retrieval.Embedding, folder: Path, truth: dict) -> np.ndarray:
  """Returns the mean of three shots' vectors for each motion, as unit vectors: (motions, d)."""
  entries, _ = retrieval.library(folder, embedding, folder.parent / 'library', 2.0, say=lambda _: None)
  by_motion = [[] for _ in MOTIONS]
  for entry in entries:
    by_motion[truth[entry.film][matched(entry, truth[entry.film])][1]].append(entry.vector)
  if min(map(len, by_motion)) < EXAMPLES:
    raise ConfigError(f'a motion has fewer than {EXAMPLES} examples')
  return retrieval.unit(np.stack([np.mean(vectors[:EXAMPLES], 0) for vectors in by_motion]))


def search(embedding: retrieval.Embedding, workdir: Path, truth: dict, examples: dict) -> tuple[dict, tuple]:
  """Searches the films for every topic, and returns topic -> shot -> cosine and (recall, precision) of the cuts."""
  entries, _ = retrieval.library(workdir / 'films', embedding, workdir / 'library', 2.0, say=lambda _: None)
  hits = [0, 0, 0]
  for film, rows in truth.items():
    true = [first for first, _ in rows[1:]]
    cuts = [round(e.begins * RATE) for e in entries if e.film == film and e.begins]
    recall, _ = trec.boundaries(cuts, true)
    hits = [hits[0] + recall * len(true), hits[1] + len(true), hits[2] + len(cuts)]
  queries = topics(embedding, workdir / 'examples', examples)
  cosines, rows = retrieval.nearest(np.stack([e.vector for e in entries]), queries, len(entries))
  scores: dict[str, dict[str, float]] = {}
  for motion, name in enumerate(MOTIONS):
    of = scores.setdefault(name.replace(' ', '_'), {})
    for cosine, row in zip(cosines[motion], rows[motion], strict=True):
      entry = entries[row]
      shot = f'{entry.film}#{matched(entry, truth[entry.film])}'
      of[shot] = max(of.get(shot, -1.0), float(cosine))
  return scores, (hits[0] / hits[1], hits[0] / max(1, hits[2]))


def judgements(truth: dict, runs: list[trec.Run]) -> tuple[trec.Judgements, trec.Judgements]:
  """Returns the judgements of all shots, and of a sample in two strata: the top ranks of the runs, and the rest."""
  rng = np.random.default_rng(0)
  whole: trec.Judgements = {}
  sampled: trec.Judgements = {}
  for motion, name in enumerate(MOTIONS):
    topic = name.replace(' ', '_')
    head = {shot for run in runs for shot in run[topic][:DEEP]}
    for film, rows in truth.items():
      for number, (_, row) in enumerate(rows):
        shot, relevance = f'{film}#{number}', int(row == motion)
        whole.setdefault(topic, {})[shot] = trec.Judgement('1', relevance)
        seen = shot in head or rng.random() < SHARE
        sampled.setdefault(topic, {})[shot] = trec.Judgement('1' if shot in head else '2', relevance if seen else -1)
  return whole, sampled


def write_judgements(path: Path, judged: trec.Judgements) -> None:
  files.write(
    path, ''.join(f'{t} 0 {d} {j.stratum} {j.relevance}\n' for t, of in judged.items() for d, j in of.items())
  )


def measure() -> None:
  workdir = Path(WORKDIR.value)
  if idx_entries(Path(SOURCE.value)) is None:
    raise ConfigError(
      f'no IDX files in {SOURCE.value}; install the Debian package dataset-fashion-mnist, or name --source'
    )
  truth, examples = write_films(workdir / 'films', FILMS.value, 1), write_films(workdir / 'examples', 10, 2)
  rng = np.random.default_rng(1)
  runs, cuts, tags = [], None, []
  for tag, embedding in (('network', retrieval.network(RUN.value)), ('colours', retrieval.layout())):
    scores, matches = search(embedding, workdir, truth, examples)
    trec.write_run(workdir / f'{tag}.run', scores, tag)
    runs.append(trec.read_run(workdir / f'{tag}.run'))
    tags.append(tag)
    cuts = cuts or (matches, embedding.rate)
  chance = {t: {d: float(rng.random()) for d in of} for t, of in scores.items()}
  trec.write_run(workdir / 'chance.run', chance, 'chance')
  runs.append(trec.read_run(workdir / 'chance.run'))
  whole, sampled = judgements(truth, runs[:2])
  write_judgements(workdir / 'judgements.txt', whole)
  write_judgements(workdir / 'sampled.txt', sampled)
  rows, told = [], {}
  for tag, run in zip([*tags, 'chance'], runs, strict=True):
    exact, inferred = trec.score(run, whole), trec.score(run, sampled)
    told[tag] = {'mAP': trec.mean(exact, 'AP'), 'mean xinfAP, sampled': trec.mean(inferred, 'xinfAP')}
    rows.append((tag, *(f'{v:.3f}' for v in told[tag].values())))
  share = sum(j.relevance >= 0 for of in sampled.values() for j in of.values()) / sum(map(len, sampled.values()))
  text = columns(('ranked by', 'mAP', f'mean xinfAP of {share:.0%} judged'), rows)
  (recall, precision), rate = cuts
  text += f'\n\ncuts: recall {recall:.3f}, precision {precision:.3f} (one frame of {1 / rate:.2f} s off at most)'
  files.write(workdir / 'retrieval.txt', text + '\n')
  told = {**told, 'cuts': [recall, precision], 'judged': share}
  files.write(workdir / 'retrieval.json', jsonfile.dumps(told, indent=1))
  print(f'{text}\n{sum(map(len, truth.values()))} shots of {len(truth)} films, {len(MOTIONS)} topics; {workdir}/*.run')


if __name__ == '__main__':
  launch.command(measure, '--run=...')

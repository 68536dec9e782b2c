"""Scores a TREC run file against TREC judgements, by mean average precision and its inferred form.

python scripts/score_run.py --run_file=run.txt --judgements=qrels.txt

If judgements have five fields, the fourth is the stratum, as in NIST's sample_eval.pl; see src/tasks/video/trec.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kronmesh.train.runtime import launch  # isort: skip  (sets the environment before JAX loads)

from absl import flags

from kronmesh.tasks.video import trec
from kronmesh.train.errors import ConfigError
from kronmesh.train.reporting.tables import columns

RUN_FILE = flags.DEFINE_string('run_file', None, 'topic Q0 document rank score tag, on every line.', required=True)
JUDGEMENTS = flags.DEFINE_string('judgements', None, 'topic 0 document [stratum] relevance.', required=True)


def score() -> None:
  for flag in (RUN_FILE, JUDGEMENTS):
    if not flag.value:
      raise ConfigError(f'--{flag.name} is empty; name a file')
  run, judgements = trec.read_run(RUN_FILE.value), trec.read_judgements(JUDGEMENTS.value)
  scores = trec.score(run, judgements)
  if not scores:
    raise ConfigError(f'{JUDGEMENTS.value}: no topic has a relevant document')
  rows = [(topic, f'{s["AP"]:.4f}', f'{s["xinfAP"]:.4f}') for topic, s in scores.items()]
  rows.append(('all', f'{trec.mean(scores, "AP"):.4f}', f'{trec.mean(scores, "xinfAP"):.4f}'))
  print(columns(('topic', 'AP', 'xinfAP'), rows))
  missing, others = set(scores) - set(run), set(run) - set(scores)
  if missing:
    print(f'{len(missing)} topics are not in the run and count 0: {", ".join(sorted(missing)[:5])}')
  if others:
    print(f'{len(others)} topics of the run have nothing relevant and do not count: {", ".join(sorted(others)[:5])}')
  backwards = trec.contradicted(RUN_FILE.value)
  if backwards:
    print(
      f'{len(backwards)} topics have scores that grow with the rank ({", ".join(backwards[:5])}): documents are ordered by '
      'score, the largest first; write distances with a minus'
    )
  strange = [topic for topic in sorted(set(scores) & set(run)) if not set(run[topic]) & judgements[topic].keys()]
  if strange:
    name = next(iter(judgements[strange[0]]))
    print(
      f'{len(strange)} topics have no judged document in the run: {", ".join(strange[:5])}; are documents called the same '
      f'in both files, such as {name!r}?'
    )


if __name__ == '__main__':
  launch.command(score, '--run_file=...')

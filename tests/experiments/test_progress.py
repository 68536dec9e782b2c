"""What a run says while it trains."""

import json

from kronmesh.train.reporting.progress import Progress
from kronmesh.train.runtime.workdir import Events


def test_what_optimisers_count_is_reported_when_there_is_more(tmp_path, capsys):
  events = Events(tmp_path, chief=True, quiet=False)
  for step, n in enumerate((0, 2, 2, 3)):
    events.count({'step': step, 'loss': 1.0, 'rejected_statistics': n, 'redamped_inverses': 0})
  lines = capsys.readouterr().err.splitlines()
  words = 'statistics were not finite and were dropped'
  assert lines == [f'warning: by step 1: 2 {words}', f'warning: by step 3: 3 {words}']
  rows = [json.loads(line) for line in (tmp_path / 'events.jsonl').read_text().splitlines()]
  assert [(row['kind'], row['step'], row['count']) for row in rows] == [('warning', 1, 2), ('warning', 3, 3)]


def test_lines_where_there_is_no_terminal(capsys):
  with Progress('run', 10, 0, 4) as bar:
    bar.update(5, {'loss': 1.5, 'accuracy': 0.5, 'clip': 1.0}, None)
    bar.note({'accuracy': 0.25})
    bar.printed = 0.0
    bar.update(6, {'loss': 1.5, 'accuracy': 0.5}, 0.1)  # a step that compiles
    for rate in (0.1, 8.0, 8.0):
      bar.update(7, {'loss': 1.5, 'accuracy': 0.5}, rate)
    bar.printed = 0.0
    bar.update(8, {'loss': 1.5, 'accuracy': 0.5}, 8.0)
    bar.update(10, {'loss': 1.25, 'accuracy': 0.5}, 8.0)
  assert capsys.readouterr().out.splitlines() == [
    'run: step 5/10, training loss 1.5, accuracy 0.5',
    'run: step 6/10, training loss 1.5, accuracy 0.5; evaluation accuracy 0.25',
    'run: step 8/10, training loss 1.5, accuracy 0.5; evaluation accuracy 0.25; 8 examples/s, about 1 s left',
    'run: step 10/10, training loss 1.25, accuracy 0.5; evaluation accuracy 0.25; 8 examples/s',
  ]
  with Progress('run', 10, 0, 4, quiet=True) as bar:
    bar.update(10, {'loss': 1.0}, None)
  assert not capsys.readouterr().out

"""What a run says while it trains."""

from experiments.progress import Progress


def test_dropped_matrices_are_reported_once_each(capsys):
  with Progress('run', 10, 0, 4) as bar:
    for n in (0, 2, 2, 3):
      bar.warn_of_rejected({'loss': 1.0, 'rejected_statistics': n, 'rejected_inverses': 0})
  lines = capsys.readouterr().err.splitlines()
  assert [line.split('far ')[1] for line in lines] == [
    '2 statistics were not finite and were dropped',
    '3 statistics were not finite and were dropped',
  ]


def test_lines_where_there_is_no_terminal(capsys):
  with Progress('run', 10, 0, 4) as bar:
    bar.update(5, {'loss': 1.5, 'accuracy': 0.5, 'clip': 1.0})
    bar.note({'accuracy': 0.25})
    bar.update(10, {'loss': 1.25, 'accuracy': 0.5})
  first, last = capsys.readouterr().out.splitlines()
  assert 'step 5/10 loss 1.5 accuracy 0.5' in first and 's left' in first and 'examples/s' in first
  assert 'step 10/10' in last and '0 s left' in last
  with Progress('run', 10, 0, 4, quiet=True) as bar:
    bar.update(10, {'loss': 1.0})
  assert not capsys.readouterr().out

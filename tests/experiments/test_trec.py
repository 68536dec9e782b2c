"""Scores of runs: cases worked by hand, and trec_eval's own code on random ones."""

import numpy as np
import pytest

from kronmesh.tasks.video import trec
from kronmesh.tasks.video.trec import Judgement
from kronmesh.train.errors import ConfigError


def judged(words, stratum='1'):
  return {word: Judgement(stratum, int(value)) for word, value in (pair.split('=') for pair in words.split())}


def test_average_precision_by_hand():
  """Relevant at ranks 1 and 3, and one that is not in the run: (1 + 2/3 + 0) / 3."""
  assert trec.average_precision(['a', 'b', 'c'], judged('a=1 b=0 c=2 d=1')) == pytest.approx((1 + 2 / 3) / 3)
  assert trec.average_precision(['a'], judged('a=0')) == 0


def test_inferred_precision_by_hand():
  """One stratum of four in the pool of which two are judged; another judged wholly.

  Run: u (pool of s, not judged), r (s, relevant), t (t, not relevant), q (t, relevant); x is in no pool.
  s: N = 3, n = 1, so r stands for 3; t: N = n = 2. Relevant: 3 + 1 = 4.
  At r, rank 2: above is u of s, of which nothing is judged: p = e / 2e = 1/2; 1/2 (1 + 1/2) = 3/4.
  At q, rank 5: above are u, r of s (judged: r, relevant: p = 1) and t of t (p = 0): 1/5 (1 + 2 + 0) = 3/5.
  (3 * 3/4 + 3/5) / 4.
  """
  pool = {**judged('u=-1 r=1 v=-1', 's'), **judged('t=0 q=1', 't')}
  assert trec.inferred_precision(['u', 'r', 't', 'x', 'q'], pool) == pytest.approx((9 / 4 + 3 / 5) / 4, rel=1e-4)


@pytest.mark.parametrize('seed', range(20))
def test_scores_are_trec_evals(seed, tmp_path):
  """By its own C code: average precision, and infAP for one stratum that is judged in part. Scores have ties."""
  pytrec_eval = pytest.importorskip('pytrec_eval')
  rng = np.random.default_rng(seed)
  documents = [f'd{i}' for i in range(60)]
  run = {t: {d: float(rng.integers(0, 20)) for d in rng.permutation(documents)[:40]} for t in ('1', '2', '3')}
  pools = {t: {d: int(rng.choice([-1, 0, 0, 1])) for d in rng.permutation(documents)[:30]} for t in run}
  trec.write_run(tmp_path / 'run', run, 'test')
  lines = [f'{t} 0 {d} {v}' for t, pool in pools.items() for d, v in pool.items()]
  (tmp_path / 'qrels').write_text('\n'.join(lines))
  found = trec.score(trec.read_run(tmp_path / 'run'), trec.read_judgements(tmp_path / 'qrels'))
  theirs = pytrec_eval.RelevanceEvaluator(pools, {'map', 'infAP'}).evaluate(run)
  assert set(found) == {t for t, pool in pools.items() if 1 in pool.values()}
  for topic in found:
    assert found[topic]['AP'] == pytest.approx(theirs[topic]['map'], abs=1e-9)
    assert found[topic]['xinfAP'] == pytest.approx(theirs[topic]['infAP'], abs=1e-6)


def test_judged_wholly_the_inferred_is_the_whole():
  rng = np.random.default_rng(0)
  pool = {f'd{i}': Judgement(str(i % 3), int(rng.integers(0, 2))) for i in range(50)}
  run = [str(d) for d in rng.permutation([*pool, *[f'x{i}' for i in range(20)]])]
  assert trec.inferred_precision(run, pool) == pytest.approx(trec.average_precision(run, pool), abs=1e-4)


def test_a_sample_estimates_the_whole():
  """Strata of which all and a third are judged: the mean over samples is the average precision."""
  rng = np.random.default_rng(0)
  run = [f'd{i}' for i in range(120)]
  relevant = {d: int(rng.random() < (0.6 if i < 40 else 0.2)) for i, d in enumerate(run)}
  whole = {d: Judgement('1' if i < 40 else '2', relevant[d]) for i, d in enumerate(run)}
  found = []
  for _ in range(300):
    kept = set(rng.permutation(run[40:])[:27])
    found.append(trec.inferred_precision(run, {
      d: j if j.stratum == '1' or d in kept else Judgement('2', -1) for d, j in whole.items()
    }))  # fmt: skip
  assert np.mean(found) == pytest.approx(trec.average_precision(run, whole), abs=0.02)


def test_boundaries_by_hand():
  assert trec.boundaries([10, 21, 40], [10, 20, 30, 50]) == (0.5, 2 / 3)
  assert trec.boundaries([10, 11], [10]) == (1.0, 0.5)  # each cut once
  assert trec.boundaries([], []) == (1.0, 1.0) and trec.boundaries([], [5]) == (0.0, 1.0)


@pytest.mark.parametrize(
  ('reader', 'text', 'words'),
  [
    (trec.read_run, '1 Q0 a 1 0.5 t\n1 Q0 a 2 0.4 t\n', 'line 2: a is in the run of topic 1 twice'),
    (trec.read_run, '1 Q0 a 1 high t\n', "line 1: the score 'high' is not a number"),
    (trec.read_run, '1 Q0 a 1 0.5\n', 'line 1: not `topic Q0'),
    (trec.read_run, '1 Q0 a 1 nan t\n', "line 1: the score 'nan' is not a number"),
    (trec.read_judgements, '\n1 0 a\n', 'line 2: not `topic 0'),
    (trec.read_judgements, '1 0 a 1 2 3\n', 'line 1: not `topic 0'),
    (trec.read_judgements, '1 0 a yes\n', "line 1: the relevance 'yes' is not a whole number"),
    (trec.read_judgements, '1 0 a 1\n1 0 a 0\n', 'line 2: a is judged for topic 1 twice'),
    (trec.read_judgements, '\n', 'is empty'),
  ],
)
def test_wrong_lines_are_named(reader, text, words, tmp_path):
  (tmp_path / 'file').write_text(text)
  with pytest.raises(ConfigError, match=words):
    reader(tmp_path / 'file')
  with pytest.raises(ConfigError, match='cannot be read: No such file'):
    reader(tmp_path / 'none')

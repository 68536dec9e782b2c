"""TREC's formats of runs and judgements, and scores: average precision, its inferred variant, shot boundaries.

A line of a run is `topic Q0 document rank score tag`. Documents are ranked by score; equal ones are ranked by name,
last first, as trec_eval does. Ranks are not read. A line of judgements is `topic 0 document relevance`, or with strata,
as NIST's sample_eval.pl reads them, `topic 0 document stratum relevance`. Relevance -1 means that the document is in
the pool and not judged; any other relevance below 1 means judged and not relevant.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from ... import data, files
from ...train.errors import ConfigError

EPSILON = 1e-5  # trec_eval's constant for the precision in strata where nothing was judged

Run = dict[str, list[str]]  # topic -> documents, best first


class Judgement(NamedTuple):
  stratum: str
  relevance: int


Judgements = dict[str, dict[str, Judgement]]  # topic -> document -> judgement


def read_run(path: str | Path) -> Run:
  """Reads a run; raises ConfigError with the number of a line that is wrong."""
  runs: dict[str, dict[str, float]] = {}
  for number, fields in _lines(path):
    if len(fields) != 6:
      raise ConfigError(f'{path}, line {number}: not `topic Q0 document rank score tag`')
    topic, _, document, _, score, _ = fields
    try:
      value = float(score)
    except ValueError:
      value = math.nan
    if value != value:
      raise ConfigError(f'{path}, line {number}: the score {score!r} is not a number, such as 0.93')
    if document in runs.setdefault(topic, {}):
      raise ConfigError(f'{path}, line {number}: {document} is in the run of topic {topic} twice')
    runs[topic][document] = value
  return {topic: ranked(scores) for topic, scores in runs.items()}


def contradicted(path: str | Path) -> list[str]:
  """Returns the topics of a run file whose scores grow with the ranks, as distances would.

  The file is nevertheless read as scores.
  """
  ranked: dict[str, list[tuple[float, float]]] = {}
  for _, (topic, _, _, rank, score, _) in _lines(path):
    if re.fullmatch(r'\d+', rank):
      ranked.setdefault(topic, []).append((float(rank), float(score)))
  odd = []
  for topic, pairs in ranked.items():
    scores = [score for _, score in sorted(pairs)]
    if len(scores) > 2 and scores[0] < scores[-1] and all(a <= b for a, b in itertools.pairwise(scores)):
      odd.append(topic)
  return odd


def ranked(scores: Mapping[str, float]) -> list[str]:
  return [document for document, _ in sorted(scores.items(), key=lambda item: (item[1], item[0]), reverse=True)]


def write_run(path: str | Path, scores: Mapping[str, Mapping[str, float]], tag: str) -> None:
  """Writes a run, topic -> document -> score, with names as `token` makes them."""
  lines = [
    f'{token(topic)} Q0 {token(document)} {rank} {of[document]:.9g} {tag}'
    for topic, of in scores.items()
    for rank, document in enumerate(ranked(of), 1)
  ]
  files.write(path, '\n'.join(lines) + '\n')


def read_judgements(path: str | Path) -> Judgements:
  """Reads judgements; raises ConfigError with the number of a line that is wrong."""
  judgements: Judgements = {}
  first = 0  # fields of the first line
  for number, fields in _lines(path):
    first = first or len(fields)
    if len(fields) != first and len(fields) in (4, 5):
      raise ConfigError(
        f'{path}, line {number}: has {len(fields)} fields and the first line {first}; write a space in a name as %20'
      )
    if len(fields) not in (4, 5):
      words = 'not `topic 0 document relevance` or `topic 0 document stratum relevance`'
      raise ConfigError(f'{path}, line {number}: {words}')
    topic, _, document, *stratum, relevance = fields
    try:
      judgement = Judgement(stratum[0] if stratum else '1', int(relevance))
    except ValueError as error:
      raise ConfigError(f'{path}, line {number}: the relevance {relevance!r} is not a whole number') from error
    if document in judgements.setdefault(topic, {}):
      raise ConfigError(f'{path}, line {number}: {document} is judged for topic {topic} twice')
    judgements[topic][document] = judgement
  return judgements


def _lines(path: str | Path) -> list[tuple[int, list[str]]]:
  try:
    lines = data.read_lines(path)
  except data.DataError as error:
    raise ConfigError(str(error)) from error
  if not lines:
    raise ConfigError(f'{path} is empty')
  return [(number, re.split(r'[ \t]+', line.strip(' \t'))) for number, line in lines]  # other spaces are part of a name


def token(name: str) -> str:
  """Returns a name without spaces, as a run file needs it.

  Spaces, characters that do not print, and % become %XX, byte by byte.
  """
  plain = lambda c: c.isprintable() and not c.isspace() and c != '%'  # noqa: E731
  return ''.join(c if plain(c) else quote(os.fsencode(c), safe='') for c in name)


def average_precision(documents: Sequence[str], judged: Mapping[str, Judgement]) -> float:
  """Returns the mean precision at the ranks of relevant documents; it is 0 for those not in the run."""
  relevant = sum(j.relevance > 0 for j in judged.values())
  hits, total = 0, 0.0
  for rank, document in enumerate(documents, 1):
    if document in judged and judged[document].relevance > 0:
      hits += 1
      total += hits / rank
  return total / relevant if relevant else 0.0


def inferred_precision(documents: Sequence[str], judged: Mapping[str, Judgement]) -> float:
  """Returns the extended inferred average precision (Yilmaz, Kanoulas and Aslam 2008).

  The judgements are a sample in each stratum. With N documents of stratum s in the pool and n of them judged, each
  judged document stands for N / n. The expected precision at rank k of a relevant document is
  1/k + (1/k) sum_s N_s p_s, with N_s pool documents of s above rank k and p_s = (relevant + e) / (judged + 2 e) among
  them. With one stratum the result is infAP. If everything is judged, it is average precision, up to e.
  """
  strata = {j.stratum for j in judged.values()}
  pool = {s: sum(j.stratum == s for j in judged.values()) for s in strata}
  known = {s: sum(j.stratum == s and j.relevance != -1 for j in judged.values()) for s in strata}
  weight = {s: pool[s] / known[s] for s in strata if known[s]}
  relevant = sum(weight[j.stratum] for j in judged.values() if j.relevance > 0)
  above = {s: [0, 0, 0] for s in strata}  # numbers in the pool, judged, relevant
  total = 0.0
  for rank, document in enumerate(documents, 1):
    if document not in judged:
      continue
    stratum, relevance = judged[document]
    if relevance > 0:
      expected = sum(n * (r + EPSILON) / (k + 2 * EPSILON) for n, k, r in above.values())
      total += weight[stratum] * (1 + expected) / rank
    above[stratum][0] += 1
    above[stratum][1] += relevance != -1
    above[stratum][2] += relevance > 0
  return total / relevant if relevant else 0.0


def score(run: Run, judgements: Judgements) -> dict[str, dict[str, float]]:
  """Returns topic -> {'AP', 'xinfAP'} for all topics with a relevant document; topics that the run lacks have 0."""
  return {
    topic: {
      'AP': average_precision(run.get(topic, []), judged),
      'xinfAP': inferred_precision(run.get(topic, []), judged),
    }
    for topic, judged in judgements.items()
    if any(j.relevance > 0 for j in judged.values())
  }


def boundaries(predicted: Sequence[int], true: Sequence[int], within: int = 1) -> tuple[float, float]:
  """Returns (recall, precision) of cuts, each matched once to a true cut at most `within` frames away."""
  left, hits = sorted(true), 0
  for cut in sorted(predicted):
    near = next((t for t in left if abs(t - cut) <= within), None)
    if near is not None:
      left.remove(near)
      hits += 1
  return hits / len(true) if true else 1.0, hits / len(predicted) if predicted else 1.0


def mean(values: Mapping[str, Mapping[str, float]], name: str) -> float:
  return sum(v[name] for v in values.values()) / len(values)

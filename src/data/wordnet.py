"""WordNet's nouns (Fellbaum 1998) as a graph that says which is a kind of which."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from .errors import DataError
from .text import read_lines
from .triples import SPLITS, KnowledgeGraph

WORDNET_DEBIAN = '/usr/share/wordnet'
_POINTERS = {'@': 'kind of', '@i': 'instance of'}
GARMENTS = (
  ('t-shirt', 1), ('trouser', 1), ('pullover', 1), ('dress', 1), ('coat', 1),
  ('sandal', 1), ('shirt', 1), ('sneaker', 1), ('bag', 4), ('boot', 1),
)  # fmt: skip
"""Lists Fashion-MNIST's classes in their order: for each a noun of WordNet, and the number of its sense."""


class Nouns(NamedTuple):
  """WordNet's noun synsets and the links between them.

  names: first noun and offset of each synset. links: (synset, relation, its hypernym). senses: synsets by noun.
  """

  names: tuple[str, ...]
  links: Int[np.ndarray, 'n 3']
  senses: dict[str, tuple[int, ...]]


def read_nouns(source: str = '') -> Nouns:
  """Reads all noun synsets of WordNet 3.0: 82,115, with 84,427 links to those that they are kinds or instances of.

  Args:
    source: a folder with `data.noun` and `index.noun`; Debian's wordnet-base by default.

  Returns:
    A named tuple of `names` (the first noun and the offset of each synset), `links` ((synset, relation, its hypernym),
    (n, 3)) and `senses` (the synsets of each noun, by the noun).

  Raises:
    DataError: the files do not exist, or are not as they should be.
  """
  where = Path(source or WORDNET_DEBIAN)
  try:
    lines = _lines(where / 'data.noun')
    index = _lines(where / 'index.noun')
  except DataError as error:
    raise DataError(
      f'wordnet: no data.noun and index.noun in {where}; install the Debian package wordnet-base, or name their folder by '
      '--config.data.source where the graph is the data, by --config.data.graph_source beside others'
    ) from error
  numbers = {line[:8]: i for i, line in enumerate(lines)}
  names, links = [], []
  try:
    for i, line in enumerate(lines):
      fields = line.partition('|')[0].split()
      words = int(fields[3], 16)
      names.append(f'{fields[4]}.{fields[0]}')
      pointers = fields[5 + 2 * words :]
      for symbol, offset, kind, _ in (pointers[k : k + 4] for k in range(0, 4 * int(fields[4 + 2 * words]), 4)):
        if symbol in _POINTERS and kind == 'n':
          links.append((i, list(_POINTERS).index(symbol), numbers[offset]))
    senses = {}
    for line in index:
      fields = line.split()
      senses[fields[0]] = tuple(numbers[offset] for offset in fields[-int(fields[2]) :])
  except (IndexError, KeyError, ValueError) as error:
    raise DataError(f"wordnet: {where} cannot be read as WordNet's data.noun and index.noun ({error!r})") from error
  return Nouns(tuple(names), np.array(links, np.int32), senses)


def _lines(path: Path) -> list[str]:
  return [line for _, line in read_lines(path) if not line.startswith(' ')]  # lines of the licence begin with a space


def synsets(nouns: Nouns, wanted: tuple[tuple[str, int], ...] = GARMENTS) -> Int[np.ndarray, ' n']:
  """Returns the synsets of nouns, each given with the number of its sense, from 1.

  Args:
    nouns: from `read_nouns`.
    wanted: (noun, number of the sense), for each; the nouns of Fashion-MNIST's classes by default.

  Raises:
    DataError: there is no such noun or sense.
  """
  read = []
  for noun, sense in wanted:
    there = nouns.senses.get(noun.lower().replace(' ', '_'), ())
    if not 0 < sense <= len(there):
      raise DataError(f'wordnet: {noun!r} has {len(there)} senses, and number {sense} is wanted')
    read.append(there[sense - 1])
  return np.array(read)


def above(nouns: Nouns, nodes: Int[np.ndarray, ' n']) -> tuple[Int[np.ndarray, ' m'], Int[np.ndarray, 'k 3']]:
  """Returns all synsets that some nodes are kinds of, and the links between them.

  Args:
    nouns: from `read_nouns`.
    nodes: the synsets to start from.

  Returns:
    The synsets, the nodes first, each once; and the links between them, (synset, relation, its hypernym), which give
    synsets by their places in the first result.
  """
  over: dict[int, list[int]] = {}
  for source, _, target in nouns.links.tolist():
    over.setdefault(source, []).append(target)
  order = list(dict.fromkeys(int(n) for n in nodes))
  for node in order:  # the list grows meanwhile
    order += [t for t in over.get(node, ()) if t not in order]
  place = {n: i for i, n in enumerate(order)}
  links = [(place[s], r, place[t]) for s, r, t in nouns.links.tolist() if s in place]
  return np.array(order), np.array(links, np.int32)


def noun_graph(source: str = '', held_out: int = 2000) -> KnowledgeGraph:
  """Returns the graph of all nouns of WordNet, with `held_out` links in valid and as many in test.

  Only links whose synsets have other links are held out, so that no synset is left without one.

  Args:
    source: the folder with WordNet's files, as in `read_nouns`.
    held_out: the number of links in each of valid and test.

  Raises:
    DataError: the files do not exist, or are not as they should be.
  """
  nouns = read_nouns(source)
  rng = np.random.default_rng(0)
  left = np.bincount(nouns.links[:, [0, 2]].reshape(-1), minlength=len(nouns.names))
  apart = []
  for k in rng.permutation(len(nouns.links)):
    source_, _, target = nouns.links[k]
    if len(apart) == 2 * held_out:
      break
    if left[source_] > 1 and left[target] > 1:
      apart.append(k)
      left[[source_, target]] -= 1
  train = np.setdiff1d(np.arange(len(nouns.links)), apart)
  parts = dict(zip(SPLITS, (train, apart[:held_out], apart[held_out:]), strict=True))
  return KnowledgeGraph(nouns.names, tuple(_POINTERS.values()), {s: nouns.links[p] for s, p in parts.items()})

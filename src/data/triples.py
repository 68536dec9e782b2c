"""Knowledge graphs as triples (source, relation, target), read from files, checked, and turned into queries of links.

Files have one triple a line, as three names between tabs (`.txt`, `.tsv`), or are N-Triples (`.nt`, read by rdflib).
"""

from __future__ import annotations

import codecs
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int

from ..extras import load
from .datasets import data_dir
from .errors import DataError
from .folders import shown
from .partition import both_directions
from .text import read_lines

SPLITS = ('train', 'valid', 'test')
"""Lists the splits of a knowledge graph."""
_FILES = ('.txt', '.tsv', '.nt')
_LONGEST = 65_536  # characters of a line of N-Triples: rdflib's time grows with their square
# Names of columns, by which a header is recognised.
_HEADS = (
  ('source', 'head', 'subject', 'from', 'h', 's'),
  ('relation', 'predicate', 'property', 'edge', 'label', 'r', 'p'),
  ('target', 'tail', 'object', 'to', 't', 'o'),
)
PYKEEN = 'pykeen==1.11.1'  # its wheel contains these sets; nothing of it is installed
OF_PYKEEN = ('umls', 'kinships', 'nations')
"""Lists the knowledge graphs that `load_triples` takes from the wheel of pykeen."""

Triples = Int[np.ndarray, 'n 3']


class KnowledgeGraph(NamedTuple):
  """Holds a knowledge graph.

  Attributes:
    entities: the names of the entities, in the order of their numbers.
    relations: the names of the relations, in the order of their numbers.
    splits: triples (source, relation, target) as numbers, by split.
  """

  entities: tuple[str, ...]
  relations: tuple[str, ...]
  splits: dict[str, Triples]


class Queries(NamedTuple):
  """Holds links with one end left out.

  Attributes:
    inputs: (entity, relation) of each query; relations from `len(relations)` on are those of links read from target to
      source.
    label: the other end.
    known: all ends that are known to be right, in any split, filled up with -1.
  """

  inputs: Int[np.ndarray, 'n 2']
  label: Int[np.ndarray, ' n']
  known: Int[np.ndarray, 'n k']


def load_triples(name: str, *, folder: str = '', source: str = '') -> KnowledgeGraph:
  """Loads a knowledge graph with the splits train, valid and test.

  Args:
    name: 'umls', 'kinships' or 'nations' (fetched once, from pykeen's wheel, by pip), or 'triples'.
    folder: where prepared data is kept; see `data_dir`.
    source: the folder with `train.txt` and so on, for 'triples', and for the others if they are not to be fetched.

  Returns:
    A `KnowledgeGraph`; names are numbered in the order of the alphabet.

  Raises:
    DataError: there is no such set or file, a line is not a triple, a triple is there twice, or another split has a
      relation or an entity that train lacks.
  """
  if name not in (*OF_PYKEEN, 'triples'):
    raise DataError(f'knowledge graph {name!r} is unknown; choose from {", ".join(OF_PYKEEN)}, triples')
  if name == 'triples' and not source:
    raise DataError(
      "data set 'triples' is a folder with train.txt, valid.txt, test.txt: name it by --config.data.source"
    )
  where = Path(source) if source else _fetched(name, data_dir(folder))
  named = {split: read_triples(_file_of(where, split)) for split in SPLITS}
  return numbered(named, where)


def numbered(named: dict[str, list[tuple[str, str, str]]], where: Path) -> KnowledgeGraph:
  """Replaces names by numbers, in the order of the alphabet.

  Raises:
    DataError: see `load_triples`.
  """
  train = named['train']
  if not train:
    raise DataError(f'{shown(where)}: train has no triples')
  _check_blank(named, where)
  entities = {e: i for i, e in enumerate(sorted({t[0] for t in train} | {t[2] for t in train}))}
  relations = {r: i for i, r in enumerate(sorted({t[1] for t in train}))}
  _tell_alike([*entities, *relations], where)
  seen: dict[tuple[str, str, str], str] = {}
  splits = {}
  for split, triples in named.items():
    for s, r, t in triples:
      for what, name, known in (('entity', s, entities), ('relation', r, relations), ('entity', t, entities)):
        if name not in known:
          raise DataError(f'{shown(where)}: {what} {name!r} of {split} is in no triple of train; leave its triples out')
      if (s, r, t) in seen:
        raise DataError(f'{shown(where)}: ({s}, {r}, {t}) of {split} is in {seen[s, r, t]} already; leave one out')
      seen[s, r, t] = split
    splits[split] = np.array([(entities[s], relations[r], entities[t]) for s, r, t in triples], np.int32).reshape(-1, 3)
  return KnowledgeGraph(tuple(entities), tuple(relations), splits)


def _check_blank(named: dict[str, list[tuple[str, str, str]]], where: Path) -> None:
  """Raises DataError if valid or test has a blank node, which has no name by which train could know it."""
  for split, triples in named.items():
    blank = next((e for s, _, t in triples for e in (s, t) if e.startswith('_:')), None) if split != 'train' else None
    if blank is not None:
      raise DataError(
        f'{shown(where)}: {blank} of {split} is a blank node, another one than that of train; give it a name (an IRI)'
      )


def _tell_alike(names: list[str], where: Path) -> None:
  """Warns of names that look the same but differ in composed characters, kinds of spaces or signs of no width."""
  seen: dict[str, str] = {}
  for name in names:
    other = seen.setdefault(_looks(name), name)
    if other != name:
      words = (
        '%s: %r and %r look the same and are two names: composed characters (NFC), kinds of spaces or signs of no width'
      )
      logging.warning(words, shown(where), ascii(other), ascii(name))
      return


def _looks(name: str) -> str:
  """Returns how a name looks: composed, with plain spaces, without characters that have no width."""
  seen = {c: unicodedata.category(c) for c in set(name)}
  plain = ''.join(' ' if seen[c] == 'Zs' else c for c in name if seen[c] != 'Cf')
  return unicodedata.normalize('NFC', ' '.join(plain.split(' '))).strip()


def read_triples(path: Path) -> list[tuple[str, str, str]]:
  """Reads the triples (source, relation, target) of a file, as names, in the order of the file.

  Args:
    path: a file with three names between tabs on every line (`.txt`, `.tsv`), or N-Triples (`.nt`).

  Raises:
    DataError: a line is not a triple, or the file cannot be read.
  """
  if path.suffix == '.nt':
    return _n_triples(path)
  triples = []
  for number, line in read_lines(path):
    parts = tuple(part.strip(' \r') for part in line.split('\t'))
    if len(parts) != 3 or not all(parts):
      raise DataError(
        f'{shown(path)}, line {number}: {line[:80]!r} is not a triple: source, relation, target with tabs between'
      )
    if (
      not triples and parts[0].lower() in _HEADS[0] and parts[1].lower() in _HEADS[1] and parts[2].lower() in _HEADS[2]
    ):
      raise DataError(f'{shown(path)}, line {number}: {line[:80]!r} is a header, no triple; remove it')
    triples.append(parts)
  return triples


def _n_triples(path: Path) -> list[tuple[str, str, str]]:
  rdflib, ntriples = load('graphs', 'rdflib'), load('graphs', 'rdflib.plugins.parsers.ntriples')
  for number, line in read_lines(path):  # raises an error that names the line if one is not UTF-8
    if len(line) > _LONGEST:
      raise DataError(f'{shown(path)}, line {number}: has {len(line):,} characters, more than {_LONGEST:,}')
  triples: list[tuple[str, str, str]] = []

  labels: dict[Any, str] = {}  # rdflib makes up a name for every blank node; the label is its name in the file

  class Labels(dict):
    def __setitem__(self, label, node):
      labels[node] = f'_:{label}'
      super().__setitem__(label, node)

  def name(term: Any) -> str:
    if isinstance(term, rdflib.BNode):
      return labels[term]
    return term.n3() if isinstance(term, rdflib.Literal) else str(term)  # "1" differs from <1> and from a typed "1"

  class Sink(ntriples.NTGraphSink):  # keeps the file's order, and triples that are there twice
    def triple(self, s, p, o):
      triples.append((name(s), name(p), name(o)))

  try:
    with path.open('rb') as file:
      file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
      ntriples.W3CNTriplesParser(Sink(rdflib.Graph()), bnode_context=Labels()).parse(file)
  except Exception as error:
    raise DataError(
      f'{shown(path)}, after {len(triples)} triples: {(str(error).splitlines() or [""])[0][:150]}'
    ) from error
  return triples


def queries(graph: KnowledgeGraph, split: str) -> Queries:
  """Makes both queries of every link of a split: (source, r) -> target, and (target, r + relations) -> source.

  Args:
    graph: the graph.
    split: 'train', 'valid' or 'test'.

  Returns:
    A `Queries` with two queries for each link: first all links from source to target, then all in reverse.
  """
  both = {name: both_directions(triples, len(graph.relations)) for name, triples in graph.splits.items()}
  everything = np.concatenate(list(both.values()))
  key = everything[:, 0].astype(np.int64) * 2 * len(graph.relations) + everything[:, 1]
  order = np.argsort(key, kind='stable')
  keys, firsts, counts = np.unique(key[order], return_index=True, return_counts=True)
  wanted = both[split]
  place = np.searchsorted(keys, wanted[:, 0].astype(np.int64) * 2 * len(graph.relations) + wanted[:, 1])
  at = np.arange(counts[place].max(initial=1))
  rows = firsts[place][:, None] + at
  there = at < counts[place][:, None]
  known = np.where(there, everything[order][np.where(there, rows, 0), 2], -1)
  return Queries(wanted[:, :2], wanted[:, 2], known.astype(np.int32))


def _file_of(where: Path, split: str) -> Path:
  paths = [where / (split + end) for end in _FILES if (where / (split + end)).is_file()]
  if len(paths) != 1:
    what = 'several' if paths else 'none'
    raise DataError(
      f'{shown(where)}: of {", ".join(split + end for end in _FILES)} one must be there, and there are {what}'
    )
  return paths[0]


def _fetched(name: str, where: Path) -> Path:
  folder = where / 'triples' / name
  if all((folder / f'{split}.txt').is_file() for split in SPLITS):
    return folder
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as temporary:
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', temporary, PYKEEN]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(temporary).glob('*.whl'))
    if not wheels:
      why = (done.stderr.strip().splitlines() or ['no wheel'])[-1][:150]
      raise DataError(
        f'{name} is in the wheel of {PYKEEN}, which pip cannot fetch ({why}); name a folder with its train.txt, valid.txt '
        'and test.txt by --config.data.source'
      )
    with zipfile.ZipFile(wheels[0]) as wheel:
      for split in SPLITS:
        text = wheel.read(f'pykeen/datasets/{name}/{split}.txt')
        part = Path(temporary) / f'{split}.part'  # another process may be fetching them too
        part.write_bytes(text)
        part.rename(folder / f'{split}.txt')  # whole or not at all
  return folder

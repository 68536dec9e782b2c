"""Triples are what their files say, or one clear line; a graph in parts is the graph."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronmesh import data
from kronmesh.data.wordnet import WORDNET_DEBIAN
from tests.data.wordnet_files import write_wordnet

TRAIN = [('a', 'likes', 'b'), ('b', 'likes', 'c'), ('c', 'knows', 'a')]


def folder_of(tmp_path, train=TRAIN, valid=(('a', 'likes', 'c'),), test=(('b', 'knows', 'a'),), end='.txt'):
  for name, triples in zip(data.SPLITS, (train, valid, test), strict=True):
    (tmp_path / f'{name}{end}').write_text(''.join('\t'.join(t) + '\n' for t in triples))
  return str(tmp_path)


def load(folder):
  return data.load_triples('triples', source=folder)


def test_triples_are_numbered_by_name(tmp_path):
  graph = load(folder_of(tmp_path, end='.tsv'))
  assert graph.entities == ('a', 'b', 'c') and graph.relations == ('knows', 'likes')
  assert graph.splits['train'].tolist() == [[0, 1, 1], [1, 1, 2], [2, 0, 0]]
  assert graph.splits['test'].tolist() == [[1, 0, 0]]


def test_n_triples(tmp_path):
  train = [f'<http://x/{s}> <http://x/{r}> <http://x/{t}> .' for s, r, t in TRAIN]
  folder_of(tmp_path)
  (tmp_path / 'train.txt').unlink()
  (tmp_path / 'valid.txt').write_text('')
  (tmp_path / 'test.txt').write_text('http://x/a\thttp://x/likes\thttp://x/c\n')
  (tmp_path / 'train.nt').write_text(
    '# a comment\n' + '\n'.join(train) + '\n<http://x/a> <http://x/likes> "caf\\u00e9"@fr .\n'
  )
  graph = load(str(tmp_path))
  assert '"café"@fr' in graph.entities and len(graph.splits['train']) == 4 and not len(graph.splits['valid'])
  (tmp_path / 'train.nt').write_text(train[0] + '\n' + 'not a triple .\n')
  with pytest.raises(data.DataError, match=r'train\.nt, after 1 triples'):
    load(str(tmp_path))


@pytest.mark.parametrize(
  'change, words',
  [
    ({'train': [*TRAIN, ('a', 'likes', 'b')]}, r'\(a, likes, b\) of train is in train already; leave one out'),
    ({'test': [('a', 'likes', 'b')]}, r'\(a, likes, b\) of test is in train already'),
    ({'test': [('a', 'likes', 'd')]}, "entity 'd' of test is in no triple of train; leave its triples out"),
    ({'valid': [('a', 'hates', 'b')]}, "relation 'hates' of valid is in no triple of train"),
    ({'train': [*TRAIN, ('a', 'likes')]}, 'train.txt, line 4: .* is not a triple: source, relation, target with tabs'),
    ({'train': [*TRAIN, ('a', ' ', 'b')]}, 'train.txt, line 4: .* is not a triple'),
    ({'train': []}, 'train has no triples'),
  ],
)
def test_bad_triples_are_one_clear_line(tmp_path, change, words):
  with pytest.raises(data.DataError, match=words) as error:
    load(folder_of(tmp_path, **change))
  assert '\n' not in str(error.value)


def test_missing_and_doubled_files_are_named(tmp_path):
  with pytest.raises(data.DataError, match=r'of train.txt, train.tsv, train.nt one must be there, and there are none'):
    load(str(tmp_path))
  folder_of(tmp_path)
  (tmp_path / 'test.nt').write_text('')
  with pytest.raises(data.DataError, match='and there are several'):
    load(str(tmp_path))
  with pytest.raises(data.DataError, match="'umsl' is unknown; choose from umls"):
    data.load_triples('umsl')
  with pytest.raises(data.DataError, match=r'name it by --config\.data\.source'):
    data.load_triples('triples')


triples = st.lists(
  st.tuples(st.integers(0, 8), st.integers(0, 2), st.integers(0, 8)), min_size=3, max_size=40, unique=True
)


@given(triples)
@settings(max_examples=50, deadline=None)
def test_known_ends_are_those_of_all_splits(found):
  array = np.array(found, np.int32)
  third = len(array) // 3
  parts = dict(zip(data.SPLITS, np.split(array, [third, 2 * third]), strict=True))
  graph = data.KnowledgeGraph(tuple('abcdefghi'), tuple('rst'), parts)
  for split in data.SPLITS:
    queries = data.queries(graph, split)
    assert len(queries.label) == 2 * len(parts[split])
    for (entity, relation), label, known in zip(*queries, strict=True):
      ends = {t for s, r, t in found if (s, r) == (entity, relation)} | {
        s for s, r, t in found if (t, r + 3) == (entity, relation)
      }
      assert set(known[known >= 0].tolist()) == ends and label in ends and (known >= 0).sum() == len(ends)


@given(st.integers(1, 30), st.integers(1, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_a_graph_in_parts_is_the_graph(nodes, parts, draw):
  """Means over neighbours by relation, as `models.graphs.neighbours` takes them."""
  ends = st.integers(0, nodes - 1)
  found = draw.draw(st.lists(st.tuples(ends, st.integers(0, 2), ends), max_size=60))
  array = np.array(found, np.int32).reshape(-1, 3)
  if nodes < parts:
    with pytest.raises(data.DataError, match=f'a graph of {nodes} nodes has no {parts} parts'):
      data.partitioned(nodes, array, parts)
    return
  split = data.partitioned(nodes, array, parts)
  x = np.random.default_rng(0).standard_normal(nodes)
  own = np.where(split.nodes >= 0, x[split.nodes], np.nan)
  shared = np.take_along_axis(own, split.shared, 1).reshape(-1)
  sums = np.zeros((nodes, 3))
  for p in range(parts):
    sent = np.concatenate([own[p], shared])
    for s, t, r, n in zip(split.source[p], split.target[p], split.relation[p], split.count[p], strict=True):
      if n:
        sums[split.nodes[p, t], r] += sent[s] / n
  for node in range(nodes):
    assert split.nodes[split.part[node], split.place[node]] == node
    for r in range(3):
      sent = [x[s] for s, kind, t in found if (kind, t) == (r, node)]
      np.testing.assert_allclose(sums[node, r], np.mean(sent) if sent else 0, atol=1e-12)


def test_a_node_outside_of_the_graph_is_refused():
  with pytest.raises(data.DataError, match='a triple has a node that is none of the 3'):
    data.partitioned(3, np.array([[0, 0, 3]]))


def test_a_graph_with_exchanged_names_is_the_same_graph():
  array = np.array([[0, 0, k] for k in range(1, 9)], np.int32)
  other = data.permuted(array, 9, seed=1)
  assert (other[:, 1] == array[:, 1]).all() and not (other == array).all()
  assert len(np.unique(other[:, 0])) == 1 and len(np.unique(other[:, 2])) == 8


def test_nouns_from_files_of_their_form(tmp_path):
  where = write_wordnet(tmp_path / 'wordnet', ['dress', 'boot'])
  nouns = data.read_nouns(where)
  names = [n.split('.')[0] for n in nouns.names]
  links = {(names[s], r, names[t]) for s, r, t in nouns.links}
  kinds = {('garment', 0, 'entity'), ('shoe', 0, 'entity'), ('dress', 0, 'garment'), ('boot', 0, 'shoe')}
  assert links == {*kinds, ('Emil', 1, 'garment')}
  nodes, above = data.above(nouns, data.synsets(nouns, (('boot', 1),)))
  assert [names[n] for n in nodes] == ['boot', 'shoe', 'entity'] and above.tolist() == [[1, 0, 2], [0, 0, 1]]
  with pytest.raises(data.DataError, match="'hat' has 0 senses, and number 1 is wanted"):
    data.synsets(nouns, (('hat', 1),))
  with pytest.raises(data.DataError, match='install the Debian package wordnet-base'):
    data.read_nouns(str(tmp_path))
  (tmp_path / 'wordnet' / 'data.noun').write_text('00001740 03 n zz entity')
  with pytest.raises(data.DataError, match='cannot be read as WordNet'):
    data.read_nouns(where)


@pytest.mark.long
@pytest.mark.skipif(not Path(WORDNET_DEBIAN, 'data.noun').exists(), reason="needs Debian's wordnet-base")
def test_wordnet_itself():
  nouns = data.read_nouns()
  assert len(nouns.names) == 82115 and len(nouns.links) == 84427
  assert len(data.synsets(nouns)) == len(data.GARMENTS)
  graph = data.noun_graph()
  train = graph.splits['train']
  assert len(np.unique(train[:, [0, 2]])) == 82115  # none dangles
  assert sum(map(len, graph.splits.values())) == 84427

"""A graph in parts, for message passing: the nodes and links of each part, and the nodes that other parts read.

METIS makes the parts (Karypis and Kumar 1998, by pymetis): they have nearly equal sizes and few links between them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ..extras import load
from .errors import DataError


class Parts(NamedTuple):
  """Holds a graph in parts, as arrays; `models.Graph` is made from them.

  There are p parts, with n places each for nodes.

  Attributes:
    nodes: the node at each place of a part, -1 where there is none.
    part: the part of each node.
    place: the place of each node in its part.
    shared: the places of a part's nodes that other parts read, filled up with place 0.
    source: the source of each link: a place in the link's part or, from n on, one among all shared places, part after
      part.
    target: the target of each link, a place in its part.
    relation: the relation of each link.
    count: the number of links of that relation that the target has; 0 where there is no link.
  """

  nodes: Int[np.ndarray, 'p n']
  part: Int[np.ndarray, ' nodes']
  place: Int[np.ndarray, ' nodes']
  shared: Int[np.ndarray, 'p k']
  source: Int[np.ndarray, 'p links']
  target: Int[np.ndarray, 'p links']
  relation: Int[np.ndarray, 'p links']
  count: Int[np.ndarray, 'p links']


def both_directions(triples: Int[np.ndarray, 'n 3'], relations: int) -> Int[np.ndarray, '2n 3']:
  """Returns all links and, behind them, every link in reverse, as a relation of its own behind the others.

  Messages go along the result, and queries ask for it (Lacroix et al. 2018, arXiv:1806.07297, section 2).

  Args:
    triples: the links (source, relation, target), as numbers.
    relations: the number of relations; the reverse of relation r gets the number r + relations.
  """
  return np.concatenate([triples, triples[:, ::-1] + np.array([0, relations, 0], triples.dtype)])


def partitioned(nodes: int, triples: Int[np.ndarray, 'n 3'], parts: int = 1) -> Parts:
  """Returns a graph divided into parts of nearly equal sizes with few links between them.

  METIS makes the parts (Karypis and Kumar 1998). A link is in the part of its target.

  Args:
    nodes: the number of nodes.
    triples: the links (source, relation, target), as numbers.
    parts: the number of parts, such as that of the shards of a batch.

  Raises:
    DataError: there are fewer nodes than parts, or a triple has a node that does not exist.
  """
  if nodes < parts:
    raise DataError(f'a graph of {nodes} nodes has no {parts} parts; make the mesh smaller')
  if len(triples) and not (triples[:, [0, 2]].min() >= 0 and triples[:, [0, 2]].max() < nodes):
    raise DataError(f'a triple has a node that is none of the {nodes}')
  source, relation, target = triples.T
  part = _metis(nodes, triples, parts)
  sizes = np.bincount(part, minlength=parts)
  order = np.argsort(part, kind='stable')
  place = np.empty(nodes, np.int64)
  place[order] = np.concatenate([np.arange(n) for n in sizes])
  table = np.full((parts, sizes.max()), -1)
  table[part, place] = np.arange(nodes)

  read = np.unique(source[part[source] != part[target]])
  counts = np.bincount(part[read], minlength=parts)
  order = read[np.argsort(part[read], kind='stable')]
  rank = np.zeros(nodes, np.int64)
  rank[order] = np.concatenate([np.arange(n) for n in counts])
  shared = np.zeros((parts, max(counts.max(), 1)), np.int64)
  shared[part[order], rank[order]] = place[order]

  at = np.where(
    part[source] == part[target], place[source], sizes.max() + part[source] * shared.shape[1] + rank[source]
  )
  kinds, group = relation.max(initial=0) + 1, target.astype(np.int64)
  _, group, many = np.unique(group * kinds + relation, return_inverse=True, return_counts=True)
  order = np.argsort(part[target], kind='stable')
  lengths = np.bincount(part[target], minlength=parts)
  row, column = part[target][order], np.concatenate([np.arange(n) for n in lengths])

  def by_part(values: np.ndarray) -> np.ndarray:
    table = np.zeros((parts, lengths.max()), values.dtype)
    table[row, column] = values[order]
    return table

  whole = lambda x: x.astype(np.int32)  # noqa: E731
  links = (whole(at), whole(place[target]), whole(relation), whole(many[group.reshape(-1)]))
  return Parts(whole(table), whole(part), whole(place), whole(shared), *map(by_part, links))


def _metis(nodes: int, triples: Int[np.ndarray, 'n 3'], parts: int) -> Int[np.ndarray, ' nodes']:
  if parts == 1:
    return np.zeros(nodes, np.int64)
  pymetis = load('graphs', 'pymetis')
  ends = triples[triples[:, 0] != triples[:, 2]][:, [0, 2]]
  ends = np.unique(np.concatenate([ends, ends[:, ::-1]]), axis=0)
  starts = np.concatenate([[0], np.cumsum(np.bincount(ends[:, 0], minlength=nodes))])
  _, part = pymetis.part_graph(parts, adjacency=pymetis.CSRAdjacency(starts, ends[:, 1]))
  return np.asarray(part)


def permuted(triples: Int[np.ndarray, 'n 3'], nodes: int, seed: int) -> Int[np.ndarray, 'n 3']:
  """Returns a graph whose nodes have exchanged their names at random, so that it says nothing about them (a control).

  Args:
    triples: the links (source, relation, target), as numbers.
    nodes: the number of nodes.
    seed: the seed of the exchange.
  """
  order = np.random.default_rng(seed).permutation(nodes).astype(triples.dtype)
  return np.stack([order[triples[:, 0]], triples[:, 1], order[triples[:, 2]]], 1)

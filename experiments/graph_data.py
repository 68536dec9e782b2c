"""The graphs that data and models are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool

from kronmesh import data


def known_graph(config: Any) -> data.KnowledgeGraph:
  """The triples that links are predicted of."""
  own = config.data
  if own.name == 'wordnet':
    return data.noun_graph(own.source)
  return data.load_triples(own.name, folder=own.folder, source=own.source)


def kinds(config: Any) -> Bool[np.ndarray, 'classes nodes']:
  """Whether each class of Fashion-MNIST is a kind of each node of the graph above them (or is it)."""
  nouns = data.read_nouns(config.data.graph_source)
  nodes, links = data.above(nouns, data.synsets(nouns))
  found = np.eye(len(nodes), dtype=bool)
  for _ in nodes:  # paths of any length
    for source, _, target in links:
      found[:, target] |= found[:, source]
  return found[: len(data.GARMENTS)]

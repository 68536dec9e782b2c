"""The graphs from which data and models are made."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool

from .. import data


def known_graph(config: Any) -> data.KnowledgeGraph:
  """Returns the knowledge graph whose links are predicted."""
  settings = config.data
  if settings.name == 'wordnet':
    return data.noun_graph(settings.source)
  return data.load_triples(settings.name, folder=settings.folder, source=settings.source)


def kinds(config: Any) -> Bool[np.ndarray, 'classes nodes']:
  """Returns whether each class of Fashion-MNIST is, or is a kind of, each node of the graph above the classes."""
  nouns = data.read_nouns(config.data.graph_source)
  nodes, links = data.above(nouns, data.synsets(nouns))
  related = np.eye(len(nodes), dtype=bool)
  for _ in nodes:  # follows paths of any length
    for source, _, target in links:
      related[:, target] |= related[:, source]
  return related[: len(data.GARMENTS)]

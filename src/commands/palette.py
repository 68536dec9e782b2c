"""The colours of all pictures: one for each optimiser, the same in every figure (Okabe and Ito's palette)."""

from __future__ import annotations

COLOURS = {
  'kfac': '#0072B2',
  'adam': '#E69F00',
  'muon': '#009E73',
  'sgd': '#CC79A7',
  'adaptive_kfac': '#56B4E9',
  'stale_kfac': '#56B4E9',
  'ekfac': '#5D3A9B',
  'natural_gradient': '#D55E00',
  'lars': '#8A6D1D',
  'lamb': '#000000',
  'kfac_jax': '#D55E00',
}
OTHERS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9', '#8A6D1D', '#000000')


def colours(names: list[str]) -> dict[str, str]:
  """Returns a colour for each name: that of its optimiser, or one that no other name has."""
  chosen: dict[str, str] = {}
  for name in names:
    wanted = COLOURS.get(name.partition(':')[0])
    if wanted is None or wanted in chosen.values():
      wanted = next((c for c in OTHERS if c not in chosen.values()), '#5f6873')
    chosen[name] = wanted
  return chosen

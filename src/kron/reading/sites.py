"""Sites, the places where a program's parameters meet data, and the records of a survey and its walk.

Every value has one of six kinds: a constant of the program (None here); `FIXED`, made from parameters and constants but
without a gradient; `INPUT`, an argument, or made from arguments without a gradient; `DATA`, an activation; a `Weight`,
made of parameters' entries; or `Derived`, any other function of parameters alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ...program import Op, Ref, source_line
from ..operators import Linear
from ..operators.weights import Weight

FIXED, INPUT, DATA = 'fixed', 'input', 'data'


class Derived(NamedTuple):
  """A function of these parameters alone, such as an L2 term; `op` is the first step that was not followed."""

  params: frozenset[int]
  op: Op


class Site(NamedTuple):
  """One use of a parameter: the operation, the operand that holds the weight, and the weight as it looks there.

  kind: 'linear'; 'entrywise' (an operation entry by entry); 'free' (any other operation, with a copy of the parameter
    for each example); 'gain' (a factor of a linear operation's kernel). A 'lifted' site is not a use by itself: a
    kernel met a constant of the program, and examples meet only the product. The product continues as a separate
    weight, of a parameter with a negative number.
  loops: for each loop around the site, outermost first, whether the loop slices the parameter.
  times: how often the site runs.
  sharded: whether the site is inside a shard_map that splits the examples.
  places: the axes of surrounding shard_maps along which each device has some places of every example.
  spread: the axis of a shard_map along which each device has some of the parameter's stacked layers, if any.
  unchecked: the axes of surrounding shard_maps along which JAX does not track how values differ (check_vma=False).
  differs: the axes of surrounding shard_maps along which the result may differ between devices.
  """

  kind: str
  op: Op
  position: int
  weight: Weight
  linear: Linear | None
  loops: tuple[bool, ...]
  times: int
  sharded: bool
  places: frozenset[str]
  spread: str | None = None
  unchecked: frozenset[str] = frozenset()
  differs: frozenset[str] = frozenset()

  @property
  def key(self) -> int:
    return self.op.outputs[0].index

  @property
  def features(self) -> tuple[int, ...]:
    """Returns the axes of the result (of the operand, for a free site) that come from the parameter."""
    return self.linear.features if self.linear else self.weight.axes


class Refusal(NamedTuple):
  """A use of a parameter that is not understood; `key` names the operation by its output.

  before_marks: whether the use matters only if an observed output depends on it.
  """

  key: int
  reason: str
  line: str
  before_marks: bool = False


class Survey(NamedTuple):
  """The findings of `find_sites`.

  sites: lists of sites by key, with several sites where an operation takes several parameters.
  chains: the steps of weights whose coefficients are arrays: output index -> parameters -> pairs (operand, number). The
    operand holds the parameters, and the number is its coefficient where the chain begins.
  refusals: lists of refusals by parameter.
  regularisers: the parameters with a separate term in the loss.
  marks: the observation marks in order, with the number of loops around each, and how often it runs.
  makers, readers: the operation that makes a value, and those that read it (None: an output of a program or a body).
  consts: the values that the program itself holds.
  lifted: lifted sites by the negative number of their product.
  behind: the values that depend on observed outputs.
  """

  sites: dict[int, list[Site]]
  chains: dict[int, dict[tuple[int, ...], tuple[tuple[int, float], ...]]]
  refusals: dict[int, list[Refusal]]
  regularisers: set[int]
  marks: list[tuple[Op, int, int]]
  makers: dict[int, Op]
  readers: dict[int, list[Op | None]]
  consts: dict[int, Any]
  lifted: dict[int, Site]
  behind: set[int]

  def copy(self) -> Survey:
    sites = {k: list(v) for k, v in self.sites.items()}
    refusals = {k: list(v) for k, v in self.refusals.items()}
    return self._replace(
      sites=sites,
      chains=dict(self.chains),
      refusals=refusals,
      regularisers=set(self.regularisers),
      marks=list(self.marks),
    )

  def owners(self, weight: Weight) -> tuple[int, ...]:
    """Returns the parameters of a weight, including those of the kernels lifted into it."""
    return tuple(p for q in weight.params for p in (self.lifted[q].weight.params if q < 0 else (q,)))


class Walk(NamedTuple):
  """The knowledge of a walk so far, and its position: `depth` loops deep, in code that runs `times` times.

  from_loss: whether the curvature comes from the loss itself, not from observed outputs.
  examples: the lengths of the axes that count examples, where they are known.
  spread, unchecked: see `Site`; `spread` is by parameter.
  differs: the axes of shard_maps along which a value may differ between devices, by the value's index.
  """

  survey: Survey
  kinds: dict[int, Any]
  depth: int = 0
  times: int = 1
  sharded: bool = False
  places: frozenset[str] = frozenset()
  spread: Mapping[int, str] = MappingProxyType({})
  from_loss: bool = False
  examples: tuple[int, ...] = ()
  unchecked: frozenset[str] = frozenset()
  differs: Mapping[int, frozenset[str]] = MappingProxyType({})

  def kind(self, value: Any) -> Any:
    return self.kinds.get(value.index) if isinstance(value, Ref) else None

  def is_behind(self, value: Any) -> bool:
    return isinstance(value, Ref) and value.index in self.survey.behind

  def params(self, kind: Any) -> frozenset[int]:
    """Returns all parameters that took part in a value."""
    if isinstance(kind, Weight):
      owners = self.survey.owners(kind)
      return frozenset(owners).union(kind.met, *(self.survey.owners(w) for w in kind.gains))
    return kind.params if isinstance(kind, Derived) else frozenset()

  def refuse(self, params: Iterable[int], reason: str, op: Op, before_marks: bool = False) -> None:
    for param in params:
      refusal = Refusal(op.outputs[0].index, reason, source_line(op), before_marks)
      self.survey.refusals.setdefault(param, []).append(refusal)

  def site(self, kind: str, op: Op, position: int, weight: Weight, linear: Linear | None = None) -> Site:
    loops = tuple(d in weight.levels for d in range(self.depth))
    if weight.params[0] < 0:
      loops = (*self.survey.lifted[weight.params[0]].loops, *loops)[: self.depth]
    spread = next((self.spread[p] for p in self.survey.owners(weight) if p in self.spread), None)
    places = self.places - {spread}
    differs = self.differs.get(op.outputs[0].index, frozenset())
    where = (self.times, self.sharded, places, spread, self.unchecked, differs)
    return Site(kind, op, position, weight, linear, loops, *where)

  def add(self, kind: str, op: Op, position: int, weight: Weight, linear: Linear | None = None) -> None:
    site = self.site(kind, op, position, weight, linear)
    self.survey.sites.setdefault(site.key, []).append(site)

  def read_once(self, value: Any) -> bool:
    return len(self.survey.readers[value.index]) <= 1

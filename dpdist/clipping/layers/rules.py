"""Groups weight uses into rules, and chooses how to take their norms.

The gradients of weight uses that share parameters add up, so their squared
norms do not. Such uses form one rule, which treats their sum as a whole: as
factors of one matrix, as gradients of one weight, or else as gradients of the
parameters themselves. A rule's squared norm is exact, and the squared norms of
different rules add up.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp

from dpdist import errors
from dpdist import registry
from dpdist.clipping.layers import convolution
from dpdist.clipping.layers import costs
from dpdist.clipping.layers import dense
from dpdist.clipping.layers import embedding
from dpdist.clipping.layers import factors
from dpdist.clipping.layers import layer_rule
from dpdist.clipping.layers import per_example
from dpdist.clipping.layers.layer_rule import Strategy
from dpdist.clipping.trace.program import WeightUse

_FALLBACK = per_example.PerExample()
_OURS = (convolution.Convolution, dense.DotGeneral, embedding.Gather)


class Form(enum.Enum):
  """The form in which gradients are added up and measured."""

  FACTORS = enum.auto()
  WEIGHT = enum.auto()
  PARAMETERS = enum.auto()


@dataclasses.dataclass(frozen=True)
class Rule:
  """How the norm of some uses' common gradient is computed."""

  uses: tuple[WeightUse, ...]  # The weight uses whose gradients add up.
  leaves: frozenset[int]  # Indices of the parameters.
  form: Form
  strategy: Strategy  # The way to their norm.
  cost: costs.Cost

  def gradient(self, of_weights: Mapping[Any, jax.Array]) -> jax.Array:
    """Adds up the gradients of the uses' weights, by their keys."""
    first = self.uses[0]
    total: Any = sum(
      _placed(use, of_weights[use.key], first) for use in self.uses
    )
    return total

  def norm_unformed(
    self,
    operands: Mapping[Any, jax.Array],
    cotangents: Mapping[Any, jax.Array],
    unit_roundoff: float,
  ) -> jax.Array:
    """Returns the norm of one example's gradient without forming it."""
    first = self.uses[0]
    if self.form is not Form.FACTORS:
      return first.layer.norm(
        self.strategy,
        first,
        operands[first.key],
        cotangents[first.key],
        unit_roundoff,
      )
    layout = first.layer.layout(first)
    parts = []
    for use in self.uses:
      part = use.layer.to_factors(use, operands[use.key], cotangents[use.key])
      if factors.swapped(use.layer.layout(use), layout):
        part = factors.transposed(part)
      parts.append(part)
    return factors.norm(parts, unit_roundoff, first.eqn.params.get("precision"))


def registered() -> tuple[layer_rule.LayerRule, ...]:
  """Returns all registered layer rules: ours, then others by name."""
  others = []
  for name, thing in registry.registered("layer_rule"):
    if thing in _OURS:
      continue
    if not (
      isinstance(thing, type) and issubclass(thing, layer_rule.LayerRule)
    ):
      raise errors.ArgumentError(
        f"a layer_rule must be a class derived from LayerRule, got {thing!r},"
        f" which is registered as {name!r}"
      )
    others.append(thing())
  return (*(one() for one in _OURS), *others)


def find(
  layer_rules: Sequence[layer_rule.LayerRule], eqn: Any, operand: int
) -> layer_rule.LayerRule | None:
  """Returns the first rule of an equation with a weight, or None.

  Without an equation, the rule is that of the per-example fallback.
  """
  if eqn is None:
    return _FALLBACK
  for rule in layer_rules:
    if (
      rule.primitive == eqn.primitive.name
      and operand in rule.weight_operands
      and rule.matches(eqn)
    ):
      return rule
  return None


def choose(
  uses: Iterable[WeightUse], groups: Sequence[int], model: costs.Model
) -> list[Rule]:
  """Covers all uses of a program by rules, each by its cheapest strategy.

  `groups` has for each parameter the number of the group it is clipped with.
  Returns the rules in order of their first use.
  """
  rules = []
  for component in _components(uses):
    clusters = _clusters(component)
    mixed = any(
      len({groups[i] for i in use.weight.leaves}) > 1 for use in component
    )
    if clusters is None or mixed:
      clusters = [(tuple(component), Form.PARAMETERS)]
    for cluster, form in clusters:
      leaves = frozenset().union(*(use.weight.leaves for use in cluster))
      offered = _strategies(cluster, form, model)
      if mixed:  # One product cannot scale its parameters' shares separately.
        offered = {layer_rule.STORE: offered[layer_rule.STORE]}
      best = min(offered, key=lambda strategy: model.seconds(offered[strategy]))
      rules.append(Rule(cluster, leaves, form, best, offered[best]))
  return rules


def _strategies(
  uses: tuple[WeightUse, ...], form: Form, model: costs.Model
) -> dict[Strategy, costs.Cost]:
  """Returns the strategies for a rule, with their costs."""
  first = uses[0]
  size = math.prod(first.weight_shape)
  if form is Form.PARAMETERS:
    size = sum(math.prod(use.weight_shape) for use in uses)
  forming = [use.layer.forming_cost(use, model) for use in uses]
  formed = costs.Cost(
    sum(c.flops for c in forming),
    sum(c.bytes for c in forming) + 8 * size,
    0,
  )
  # A kept gradient is most of the work of the sum already.
  offered = {layer_rule.STORE: costs.Cost(0, formed.bytes + 4 * size, 4 * size)}
  # The rounding of a sum of products is bounded at the weights, not after their
  # gradients are taken to the parameters.
  if form is not Form.PARAMETERS and not any(
    use.eqn is None or use.weight.narrow for use in uses
  ):
    offered[layer_rule.RECOMPUTE] = formed
  if form is Form.FACTORS:
    sizes = [use.layer.factor_sizes(use) for use in uses]
    offered[layer_rule.GRAM] = costs.gram(sizes, model)
  elif form is Form.WEIGHT and len(uses) == 1:
    offered |= first.layer.strategies(first, model)
  return offered


def _components(uses: Iterable[WeightUse]) -> list[list[WeightUse]]:
  """Groups weight uses that share parameters, directly or through others."""
  components: list[list[WeightUse]] = []
  for use in uses:
    joined = [use]
    others = []
    for component in components:
      shares = any(use.weight.leaves & s.weight.leaves for s in component)
      if shares:
        joined = component + joined
      else:
        others.append(component)
    components = [*others, joined]
  return components


def _clusters(
  component: Sequence[WeightUse],
) -> list[tuple[tuple[WeightUse, ...], Form]] | None:
  """Splits a component into parts whose squared norms add up, with forms.

  Returns None if only the parameters' own gradients can be used.
  """
  clusters: list[list[WeightUse]] = []
  for use in component:
    if use.weight.origin is None or use.weight.narrow:
      return None
    for cluster in clusters:
      if _place(use) == _place(cluster[0]):
        cluster.append(use)
        break
    else:
      clusters.append([use])
  for i, one in enumerate(clusters):
    for other in clusters[:i]:
      if not _disjoint(_place(one[0]), _place(other[0])):
        return None
  formed = []
  for cluster in clusters:
    # A lookup's rows are one-hot and cannot be swapped with its columns. The
    # other uses' factors are swapped to match the first use's.
    cluster.sort(key=lambda use: use.layer.can_transpose)
    form = _form(cluster)
    if form is None:
      return None
    formed.append((tuple(cluster), form))
  return formed


def _place(use: WeightUse) -> tuple[object, ...]:
  assert use.weight.origin is not None
  steps = use.weight.origin.steps
  while steps[-1][0] == "transpose":
    steps = steps[:-1]
  return steps


def _form(cluster: Sequence[WeightUse]) -> Form | None:
  layouts = [use.layer.layout(use) for use in cluster]
  first = layouts[0]
  if first is not None and all(
    x is not None and factors.swapped(first, x) in _turns(use)
    for use, x in zip(cluster, layouts, strict=True)
  ):
    return Form.FACTORS
  origins = {use.weight.origin for use in cluster}
  shapes = {use.weight_shape for use in cluster}
  return Form.WEIGHT if len(origins) == len(shapes) == 1 else None


def _turns(use: WeightUse) -> tuple[bool, ...]:
  """Returns which values of `factors.swapped` a use's factors allow."""
  return (False, True) if use.layer.can_transpose else (False,)


def _disjoint(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
  """Returns whether two images contain different entries of the parameters."""
  for a, b in zip(one, other, strict=False):
    if a == b:
      continue
    if a[0] != "slice" or b[0] != "slice":  # type: ignore[index]
      # Different parameters, or images that cannot be compared.
      return a[0] == b[0] == "leaf"  # type: ignore[index]
    return any(
      a_end <= b_start or b_end <= a_start
      for a_start, a_end, b_start, b_end in zip(*a[1:], *b[1:], strict=True)  # type: ignore[index]
    )
  return False


def _placed(use: WeightUse, x: jax.Array, first: WeightUse) -> jax.Array:
  """Permutes the axes of a weight's gradient to those of `first`'s weight."""
  axes = list(range(x.ndim))
  lead = x.ndim - len(use.var.aval.shape)
  for one, invert in ((use, True), (first, False)):
    assert one.weight.origin is not None
    trailing = []
    for step in reversed(one.weight.origin.steps):
      if step[0] != "transpose":
        break
      trailing.append(step[1])
    for permutation in trailing if invert else reversed(trailing):
      if invert:
        order = [permutation.index(a) for a in range(len(permutation))]
      else:
        order = list(permutation)
      axes = [*axes[:lead], *(axes[lead + a] for a in order)]
  return jnp.transpose(x, axes)

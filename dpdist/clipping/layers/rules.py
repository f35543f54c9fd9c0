"""Groups sites into rules, and chooses each rule's way to a gradient norm.

The gradients of sites that share parameters add up, so their squared norms do
not. Such sites form one rule, which treats their sum as a whole: as factors of
one matrix, as gradients of one weight, or else as gradients of the parameters
themselves. A rule's squared norm is exact, and the squared norms of different
rules add up.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import math

from dpdist.clipping.layers import convolution
from dpdist.clipping.layers import costs
from dpdist.clipping.layers import dense
from dpdist.clipping.trace.program import Site


@dataclasses.dataclass(frozen=True)
class Rule:
  """How the norm of some sites' common gradient is computed.

  Attributes:
    sites: the sites whose gradients add up.
    leaves: indices of the parameters.
    view: the form of the gradients: "factors", "weight" or "parameters".
    way: "gram" or "diagonal" (never formed), "keep" (formed, and kept for the
      sum), "drop" (formed for the norm; the sum is another product).
    cost: the cost of that way; see `costs`.
  """

  sites: tuple[Site, ...]
  leaves: frozenset[int]
  view: str
  way: str
  cost: costs.Cost


def choose(
  sites: Iterable[Site], groups: Sequence[int], model: costs.Model
) -> list[Rule]:
  """Covers all sites by rules, each by its cheapest way.

  Args:
    sites: the sites of a program.
    groups: for each parameter the number of the group it is clipped with.
    model: the backend's speed.

  Returns:
    Rules, in order of their first site.
  """
  rules = []
  for component in _components(sites):
    clusters = _clusters(component)
    mixed = any(
      len({groups[i] for i in site.weight.leaves}) > 1 for site in component
    )
    if clusters is None or mixed:
      clusters = [(tuple(component), "parameters")]
    for cluster, view in clusters:
      leaves = frozenset().union(*(site.weight.leaves for site in cluster))
      ways = dict(_ways(cluster, view, model))
      if mixed:  # One product cannot scale its parameters' shares separately.
        ways = {"keep": ways["keep"]}
      way = min(ways, key=lambda w: model.seconds(ways[w]))
      rules.append(Rule(cluster, leaves, view, way, ways[way]))
  return rules


def _ways(
  sites: tuple[Site, ...], view: str, model: costs.Model
) -> Iterable[tuple[str, costs.Cost]]:
  size = math.prod(sites[0].weight_shape)
  products = [site for site in sites if site.eqn is not None]
  if view == "parameters":
    size = sum(math.prod(site.weight_shape) for site in sites)
  forming = [costs.forming(site, model) for site in products]
  formed = costs.Cost(
    sum(c.flops for c in forming),
    sum(c.bytes for c in forming) + 8 * size,
    0,
  )
  # A kept gradient is most of the work of the sum already.
  yield "keep", costs.Cost(0, formed.bytes + 4 * size, 4 * size)
  narrow = any(site.weight.narrow for site in sites)
  # The rounding of a sum of products is bounded at the weights, not after their
  # gradients are taken to the parameters.
  if len(products) == len(sites) and not narrow and view != "parameters":
    yield "drop", formed
  if view == "factors":
    yield "gram", costs.gram(sites, model)
  elif (
    view == "weight"
    and len(sites) == 1
    and sites[0].name == "conv_general_dilated"
    and not sites[0].lengths
  ):
    shape = convolution.sizes(sites[0])
    yield "gram", costs.patch_gram(shape, model)
    yield "diagonal", costs.diagonal_gram(shape, model)


def _components(sites: Iterable[Site]) -> list[list[Site]]:
  """Groups sites that share parameters, directly or through others."""
  components: list[list[Site]] = []
  for site in sites:
    mine = [site]
    others = []
    for component in components:
      shares = any(site.weight.leaves & s.weight.leaves for s in component)
      if shares:
        mine = component + mine
      else:
        others.append(component)
    components = [*others, mine]
  return components


def _clusters(
  component: Sequence[Site],
) -> list[tuple[tuple[Site, ...], str]] | None:
  """Splits a component into parts whose squared norms add up, with views.

  Returns:
    None if only the parameters' own gradients can be used.
  """
  clusters: list[list[Site]] = []
  for site in component:
    if site.weight.origin is None or site.weight.narrow:
      return None
    for cluster in clusters:
      if _place(site) == _place(cluster[0]):
        cluster.append(site)
        break
    else:
      clusters.append([site])
  for i, one in enumerate(clusters):
    for other in clusters[:i]:
      if not _disjoint(_place(one[0]), _place(other[0])):
        return None
  views = []
  for cluster in clusters:
    # A lookup's rows are one-hot and cannot be swapped with its columns. The
    # other sites' factors are swapped to match the first site's.
    cluster.sort(key=lambda site: site.name != "gather")
    view = _view(cluster)
    if view is None:
      return None
    views.append((tuple(cluster), view))
  return views


def _place(site: Site) -> tuple[object, ...]:
  assert site.weight.origin is not None
  steps = site.weight.origin.steps
  while steps[-1][0] == "transpose":
    steps = steps[:-1]
  return steps


def _view(cluster: Sequence[Site]) -> str | None:
  layouts = [dense.layout(site) for site in cluster]
  first = layouts[0]
  if first is not None and all(
    x is not None and dense.swapped(first, x) in _turns(site)
    for site, x in zip(cluster, layouts, strict=True)
  ):
    return "factors"
  origins = [site.weight.origin for site in cluster]
  loops = {site.weight_shape for site in cluster}
  return "weight" if len(set(origins)) == len(loops) == 1 else None


def _turns(site: Site) -> tuple[bool, ...]:
  """Returns which values of `dense.swapped` a site's factors allow."""
  return (False,) if site.name == "gather" else (False, True)


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

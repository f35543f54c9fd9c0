"""The loss of one example taken apart: where its parameters meet its data.

A loss is traced for one example and read as a list of equations. Every value
in it is a constant, a weight (computed from parameters and constants alone) or
data. A place where a weight meets data is a site. There are two sorts:

* A product: dot, convolution or embedding lookup. The weight stays one array
  for all examples. The gradient of an example with respect to it is a function
  of two small things, the data operand and the gradient of the output.
* A promotion: anything else (a bias, a scale, a branch, a user's own
  derivative, ...). There the weight is handed on as data, and JAX takes its
  derivative for each example by itself. This is exact for every program that
  JAX can differentiate; it costs one gradient of that weight for each example.

Loops and rematerialised parts become blocks of their own, with their sites.
This page has the words for it. `splitting.py` finds the sites, `evaluate.py`
runs what was found.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import enum
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp

# A call of these is replaced by what it calls. Not custom_jvp or custom_vjp:
# that would lose the derivative that the user wrote.
_CALLS = ("jit", "pjit", "closed_call", "core_call")
# They leave values as they are: some print, one names the axis of a collective.
_KNOWN_EFFECTS = ("DebugEffect", "OrderedDebugEffect", "NamedAxisEffect")


class Kind(enum.IntEnum):
  """What a value depends on."""

  CONSTANT = 0
  WEIGHT = 1
  DATA = 2


class Origin(NamedTuple):
  """How a weight is an isometric image of (parts of) parameters.

  Attributes:
    leaves: indices of the parameters, all different.
    steps: hashable; equal steps mean equal images. The first is
      ("leaf", index) or ("join", axis, the steps of each part).
  """

  leaves: frozenset[int]
  steps: tuple[Any, ...]

  def then(self, *step: Any) -> "Origin":
    """The origin one step further on."""
    return Origin(self.leaves, (*self.steps, step))


class Weight(NamedTuple):
  """What is known of a weight.

  Attributes:
    leaves: indices of the parameters that it depends on.
    origin: None where it is no isometric image of parameters.
    loops: for each enclosing loop whether the weight differs by iteration.
    narrow: a step towards it computes in less than float32, or from what has
      been rounded to less, and float32 cannot be used instead.
    rounded: a step towards it is in less than float32.
  """

  leaves: frozenset[int]
  origin: Origin | None
  loops: tuple[bool, ...]
  narrow: bool
  rounded: bool


@dataclasses.dataclass(frozen=True)
class Site:
  """A place where a weight meets data.

  Attributes:
    key: where it is: an equation's number for each enclosing block, then its
      own; promotions have negative ones.
    eqn: the product; None for a promotion.
    operand: which operand of the product is the weight.
    var: the weight, a variable of its block.
    weight: what is known of it.
    lengths: of the enclosing loops.
    out: the tapped value, for one example and one iteration.
  """

  key: tuple[int, ...]
  eqn: Any
  operand: int
  var: Any
  weight: Weight
  lengths: tuple[int, ...]
  out: jax.ShapeDtypeStruct

  @property
  def name(self) -> str:
    """The primitive's name, or "promotion"."""
    return "promotion" if self.eqn is None else self.eqn.primitive.name

  @property
  def tap_shape(self) -> tuple[int, ...]:
    """Shape of the gradient of the tapped value, for one example."""
    return (*self.lengths, *self.out.shape)

  @property
  def weight_shape(self) -> tuple[int, ...]:
    """Shape of the weight, with an axis for each loop that it differs in."""
    mapped = zip(self.lengths, self.weight.loops, strict=True)
    return (*(n for n, m in mapped if m), *self.var.aval.shape)


@dataclasses.dataclass
class Block:
  """A straight list of equations.

  Attributes:
    jaxpr: closed.
    kinds: of the inputs.
    num_data_outs: so many outputs are data; the others may be weights.
    depth: how many loops enclose it, its own not counted.
    loop: length of the loop of which this is the body, or None.
    first_stacked: inputs from this one on are given anew to each iteration.
    kind: of every variable.
    weights: what is known of every weight variable.
    sites: by number, products and promotions.
    promotions: weight variables that are handed on as data, to their number.
    definition: the equation that defines a weight variable.
    blocks: by the equation's number.
  """

  jaxpr: core.ClosedJaxpr
  kinds: tuple[Kind, ...]
  num_data_outs: int
  depth: int = 0
  loop: int | None = None
  first_stacked: int = 0
  kind: dict[Any, Kind] = dataclasses.field(default_factory=dict)
  weights: dict[Any, Weight] = dataclasses.field(default_factory=dict)
  sites: dict[int, Site] = dataclasses.field(default_factory=dict)
  promotions: dict[Any, int] = dataclasses.field(default_factory=dict)
  definition: dict[Any, Any] = dataclasses.field(default_factory=dict)
  blocks: dict[int, "Block"] = dataclasses.field(default_factory=dict)

  def all_sites(self) -> Iterator[Site]:
    """Its own and those of the blocks in it, in order of execution."""
    yield from self.sites.values()
    for block in self.blocks.values():
      yield from block.all_sites()

  def convolves(self) -> bool:
    """Whether there is a convolution in it, of whatever."""
    return any(
      uses(eqn, "conv_general_dilated") for eqn in self.jaxpr.jaxpr.eqns
    )

  def rematerialises(self) -> bool:
    """Whether a part with weights is computed again in the backward pass."""
    return any(
      block.loop is None or block.rematerialises()
      for block in self.blocks.values()
    )

  def is_wide(self) -> bool:
    """Whether nothing in it, or in what it calls, is in less than float32."""
    return not _has_narrow(self.jaxpr.jaxpr)

  def has_custom_vjp(self) -> bool:
    """Whether a derivative in it is the user's, and perhaps not linear."""
    return any(map(has_custom_vjp, self.jaxpr.jaxpr.eqns))

  def kind_of(self, atom: Any) -> Kind:
    """Literals are constants."""
    if isinstance(atom, core.Literal):
      return Kind.CONSTANT
    return self.kind[atom]


def trace(
  loss_fn: Callable[..., Any], params: Any, *example: Any
) -> tuple[core.ClosedJaxpr, Any]:
  """Traces a loss, and replaces calls by what they call.

  Args:
    loss_fn: (params, *example) -> pytree.
    params: pytree of arrays.
    *example: pytrees of one example.

  Returns:
    The equations, with the leaves of (params, *example) as inputs and those of
    the result as outputs; and the result's shapes.
  """
  closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(params, *example)
  # What has effects is not taken apart, and stays as it is.
  return closed if effects(closed.jaxpr) else without_calls(closed), shapes


def effects(program: Any) -> tuple[str, ...]:
  """Names of the effects that a list of equations cannot be taken apart with.

  Equations are read as functions of their operands. One that writes into an
  operand, as into a `jax.new_ref`, or speaks with the world outside, is none.

  Args:
    program: a jaxpr or an equation.
  """
  found = {type(effect).__name__ for effect in program.effects}
  return tuple(sorted(found.difference(_KNOWN_EFFECTS)))


def bind(eqn: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
  """Runs an equation on values; a list of its outputs."""
  # Constants may be NumPy's, which a derivative of the user's that indexes them
  # by a traced number does not expect.
  if eqn.primitive.name.startswith("custom_"):
    values = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in values]
  bound = eqn.primitive.get_bind_params(eqn.params | changed)
  # A plain dict in some releases of JAX, a pair in others.
  functions, params = bound if isinstance(bound, tuple) else ((), bound)
  with eqn.ctx.manager:
    out = eqn.primitive.bind(*functions, *values, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


def without_calls(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
  """Replaces calls by what they call."""
  if not any(e.primitive.name in _CALLS for e in closed.jaxpr.eqns):
    return closed

  def run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    read = lambda x: x.val if isinstance(x, core.Literal) else env[x]
    for eqn in jaxpr.eqns:
      values = [read(x) for x in eqn.invars]
      inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
      if eqn.primitive.name in _CALLS:
        out = run(inner.jaxpr, inner.consts, values)
      else:
        out = bind(eqn, values)
      env.update(zip(eqn.outvars, out, strict=True))
    return [read(x) for x in jaxpr.outvars]

  return jax.make_jaxpr(lambda *args: run(closed.jaxpr, closed.consts, args))(
    *[x.aval for x in closed.jaxpr.invars]
  )


def has_custom_vjp(eqn: Any) -> bool:
  """Whether an equation is or calls a function with its own derivative."""
  return uses(eqn, "custom_vjp")


def uses(eqn: Any, prefix: str) -> bool:
  """Whether an equation is, or calls, a primitive whose name begins so."""
  return eqn.primitive.name.startswith(prefix) or any(
    uses(inner, prefix)
    for jaxpr in core.jaxprs_in_params(eqn.params)
    for inner in jaxpr.eqns
  )


def computes_narrow(eqn: Any) -> bool:
  """Whether an equation has values of less than float32, or calls what has."""
  return any(is_narrow(x.aval) for x in (*eqn.invars, *eqn.outvars)) or any(
    map(_has_narrow, core.jaxprs_in_params(eqn.params))
  )


def _has_narrow(jaxpr: Any) -> bool:
  return any(
    is_narrow(x.aval) for x in (*jaxpr.invars, *jaxpr.constvars)
  ) or any(map(computes_narrow, jaxpr.eqns))


def is_narrow(aval: Any) -> bool:
  dtype = getattr(aval, "dtype", None)
  return (
    dtype is not None
    and jnp.issubdtype(dtype, jnp.floating)
    and jnp.finfo(dtype).bits < 32
  )

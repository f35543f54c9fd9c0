"""Data structures of a loss that is split where its parameters meet its data.

A loss is traced for one example and read as a list of equations. Every value
in it is a constant, a weight (computed from parameters and constants alone) or
data. A place where a weight meets data is a weight use. There are two sorts:

* A product: a layer with a rule, such as a dot, a convolution or an embedding
  lookup. The weight stays one array for all examples. An example's gradient
  with respect to it is a function of two small arrays, the data operand and the
  gradient of the output.
* A per-example fallback: anything else (a bias, a scale, a branch, a custom
  derivative, ...). There the weight becomes data, and JAX differentiates it for
  each example. This is exact for every program that JAX can differentiate; it
  costs one gradient of that weight for each example.

Loops and rematerialised parts become blocks of their own, with their uses.
This module defines the terms. `split.py` finds the uses, `evaluate.py` runs the
result.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import enum
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp

# Calls of these are replaced by their bodies. Calls of custom_jvp or custom_vjp
# are not, since that would lose the custom derivative.
_CALLS = ("jit", "pjit", "closed_call", "core_call")
# These do not change values: some print, one names the axis of a collective.
_KNOWN_EFFECTS = ("DebugEffect", "OrderedDebugEffect", "NamedAxisEffect")


class Kind(enum.IntEnum):
  """The kind of a value, by what it depends on."""

  CONSTANT = 0
  WEIGHT = 1
  DATA = 2


class Origin(NamedTuple):
  """How a weight is made as an isometric image of (parts of) parameters."""

  leaves: frozenset[int]  # Indices of the parameters, all different.
  # Hashable; equal steps mean equal images. The first is ("leaf", index) or
  # ("join", axis, the steps of each part).
  steps: tuple[Any, ...]

  def then(self, *step: Any) -> "Origin":
    """Returns the origin with one more step."""
    return Origin(self.leaves, (*self.steps, step))


class Weight(NamedTuple):
  """What is known about a weight."""

  leaves: frozenset[int]  # Indices of the parameters that it depends on.
  origin: Origin | None  # None where it is no isometric image of parameters.
  # For each enclosing loop whether the weight differs by iteration.
  loops: tuple[bool, ...]
  # Whether a step of its computation is in less than float32, or uses values
  # that were rounded to less, and float32 cannot be used instead.
  narrow: bool
  rounded: bool  # Whether a step of its computation is in less than float32.


@dataclasses.dataclass(frozen=True)
class WeightUse:
  """A place where a weight meets data."""

  # Its place: an equation's number for each enclosing block, then its own;
  # fallbacks have negative numbers.
  key: tuple[int, ...]
  eqn: Any  # The product; None for a fallback.
  # The `dpdist.clipping.layers.layer_rule.LayerRule` of the product, or that of
  # fallbacks.
  layer: Any
  operand: int  # Which operand of the product is the weight.
  var: Any  # The weight, a variable of its block.
  weight: Weight
  lengths: tuple[int, ...]  # Lengths of the enclosing loops.
  # The tapped value, for one example and one iteration.
  out: jax.ShapeDtypeStruct

  @property
  def name(self) -> str:
    """Returns what the rule is for: a primitive, or the fallback."""
    return str(self.layer.primitive)

  @property
  def tap_shape(self) -> tuple[int, ...]:
    """Returns the shape of the tapped value's gradient for one example."""
    return (*self.lengths, *self.out.shape)

  @property
  def weight_shape(self) -> tuple[int, ...]:
    """Returns the weight's shape, with an axis for each loop it differs in."""
    mapped = zip(self.lengths, self.weight.loops, strict=True)
    return (*(n for n, m in mapped if m), *self.var.aval.shape)


@dataclasses.dataclass
class Block:
  """A straight list of equations."""

  jaxpr: core.ClosedJaxpr
  kinds: tuple[Kind, ...]  # The kind of each input.
  # How many outputs, the first ones, are data; the others may be weights.
  num_data_outs: int
  depth: int = 0  # How many loops enclose it, its own not counted.
  loop: int | None = None  # Length of the loop whose body this is, or None.
  # Inputs from this one on have a slice for each iteration.
  first_stacked: int = 0
  # The kind of every variable.
  kind: dict[Any, Kind] = dataclasses.field(default_factory=dict)
  # What is known about every weight variable.
  weights: dict[Any, Weight] = dataclasses.field(default_factory=dict)
  # Products and fallbacks by number.
  uses: dict[int, WeightUse] = dataclasses.field(default_factory=dict)
  # The number of each weight variable that becomes data.
  fallbacks: dict[Any, int] = dataclasses.field(default_factory=dict)
  # The equation that defines each weight variable.
  definition: dict[Any, Any] = dataclasses.field(default_factory=dict)
  # Inner blocks by their equation's number.
  blocks: dict[int, "Block"] = dataclasses.field(default_factory=dict)

  def all_uses(self) -> Iterator[WeightUse]:
    """Yields its uses and those of inner blocks, in order of execution."""
    yield from self.uses.values()
    for block in self.blocks.values():
      yield from block.all_uses()

  def convolves(self) -> bool:
    """Returns whether there is any convolution in it."""
    return any(
      calls(eqn, "conv_general_dilated") for eqn in self.jaxpr.jaxpr.eqns
    )

  def rematerialises(self) -> bool:
    """Returns whether the backward pass recomputes a part with weights."""
    return any(
      block.loop is None or block.rematerialises()
      for block in self.blocks.values()
    )

  def is_wide(self) -> bool:
    """Returns whether nothing in it or in what it calls is below float32."""
    return not _has_narrow(self.jaxpr.jaxpr)

  def has_custom_vjp(self) -> bool:
    """Returns whether it has a custom derivative, which may be nonlinear."""
    return any(calls(eqn, "custom_vjp") for eqn in self.jaxpr.jaxpr.eqns)

  def kind_of(self, atom: Any) -> Kind:
    """Returns the kind of a variable; literals are constants."""
    if isinstance(atom, core.Literal):
      return Kind.CONSTANT
    return self.kind[atom]


def trace(
  loss_fn: Callable[..., Any], params: Any, *example: Any
) -> tuple[core.ClosedJaxpr, Any]:
  """Traces a loss of one example, and replaces calls by their bodies.

  Returns the equations, with the leaves of (params, *example) as inputs and
  those of the result as outputs; and the result's shapes.
  """
  closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(params, *example)
  # A program with effects is not analyzed, and stays unchanged.
  return closed if effects(closed.jaxpr) else without_calls(closed), shapes


def effects(program: Any) -> tuple[str, ...]:
  """Returns the names of effects of a jaxpr or equation that prevent analysis.

  Equations are read as functions of their operands. An equation that writes
  into an operand, such as a `jax.new_ref`, or does input or output, is not one.
  """
  names = {type(effect).__name__ for effect in program.effects}
  return tuple(sorted(names.difference(_KNOWN_EFFECTS)))


def bind(eqn: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
  """Runs an equation on values, and returns a list of its outputs."""
  # Constants may be NumPy arrays; a custom derivative that indexes them by a
  # traced number would fail.
  if eqn.primitive.name.startswith("custom_"):
    values = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in values]
  bound = eqn.primitive.get_bind_params(eqn.params | changed)
  # A plain dict in some releases of JAX, a pair in others.
  functions, params = bound if isinstance(bound, tuple) else ((), bound)
  with eqn.ctx.manager:
    out = eqn.primitive.bind(*functions, *values, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


def without_calls(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
  """Replaces calls by their bodies."""
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


def calls(eqn: Any, prefix: str) -> bool:
  """Returns whether an equation is or calls a primitive with this prefix."""
  return eqn.primitive.name.startswith(prefix) or any(
    calls(inner, prefix)
    for jaxpr in core.jaxprs_in_params(eqn.params)
    for inner in jaxpr.eqns
  )


def is_floating(eqn: Any) -> bool:
  """Returns whether all operands and results are floats."""
  return all(
    jnp.issubdtype(x.aval.dtype, jnp.floating)
    for x in (*eqn.invars, *eqn.outvars)
  )


def computes_narrow(eqn: Any) -> bool:
  """Returns whether an equation, or its body, has floats below float32."""
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

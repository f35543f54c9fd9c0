"""Finds where the parameters of a loss meet its data; see `program.py`."""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp

from dpdist.clipping.trace import program
from dpdist.clipping.trace.program import Block
from dpdist.clipping.trace.program import Kind
from dpdist.clipping.trace.program import Origin
from dpdist.clipping.trace.program import Weight
from dpdist.clipping.trace.program import WeightUse

_REMAT = ("remat", "remat2", "checkpoint")
# Returns the rule of an equation whose operand of this number is a weight, None
# if there is none; or of fallbacks, if the equation is None.
FindLayer = Callable[[Any, int], Any]
# Equations that only move entries or change their signs: a gradient has the
# same norm before and after.
_ISOMETRIES = (
  "reshape",
  "transpose",
  "squeeze",
  "expand_dims",
  "rev",
  "neg",
)
# Equations that do not even move entries.
_IDENTITIES = (
  "convert_element_type",
  "copy",
  "copy_p",
  "sharding_constraint",
  "reduce_precision",
)
# Equations that may be computed in float32 although the model says bfloat16.
_WIDENED = (
  *_ISOMETRIES,
  *_IDENTITIES,
  *("concatenate", "stack", "slice", "split", "broadcast_in_dim"),
)


def split(
  closed: core.ClosedJaxpr,
  num_leaves: int,
  num_constants: int,
  find_layer: FindLayer,
) -> Block:
  """Finds what every value depends on, and where weights meet data.

  `closed` is as `program.trace` returns it. Its first num_leaves inputs are
  trained parameters, the next num_constants are frozen ones, the others are
  data. Its first output is the loss, the others are its aux. Returns the block
  of the whole program, whose first output is data.
  """
  invars = closed.jaxpr.invars
  num_data = len(invars) - num_leaves - num_constants
  kinds = (
    (Kind.WEIGHT,) * num_leaves
    + (Kind.CONSTANT,) * num_constants
    + (Kind.DATA,) * num_data
  )
  weights = [
    Weight(
      frozenset([i]), Origin(frozenset([i]), (("leaf", i),)), (), False, False
    )
    for i in range(num_leaves)
  ]
  return _Splitter((), (), find_layer).split(
    Block(closed, kinds, 1), weights, {}
  )


class _Splitter:
  """Walks one block; see `split`."""

  def __init__(
    self,
    prefix: tuple[int, ...],
    lengths: tuple[int, ...],
    find_layer: FindLayer,
  ):
    self._prefix = prefix
    self._lengths = lengths
    self._find_layer = find_layer

  def split(
    self,
    block: Block,
    weights: Sequence[Weight],
    loops: dict[Any, tuple[bool, ...]],
  ) -> Block:
    """Fills in an empty block, and returns it.

    `weights` tells what is known about its weight inputs, in order; `loops`,
    for constant inputs, in which of the loops they differ, if in any.
    """
    self._block = block
    self._loops = loops
    jaxpr = block.jaxpr.jaxpr
    block.kind.update((x, Kind.CONSTANT) for x in jaxpr.constvars)
    block.kind.update(zip(jaxpr.invars, block.kinds, strict=True))
    inputs = [
      x
      for x, k in zip(jaxpr.invars, block.kinds, strict=True)
      if k == Kind.WEIGHT
    ]
    block.weights.update(zip(inputs, weights, strict=True))
    for number, eqn in enumerate(jaxpr.eqns):
      self._equation(number, eqn)
    for out in jaxpr.outvars[: block.num_data_outs]:
      self._fall_back(out)
    return block

  def _equation(self, number: int, eqn: Any) -> None:
    block = self._block
    kinds = [block.kind_of(x) for x in eqn.invars]
    if max(kinds, default=Kind.CONSTANT) == Kind.CONSTANT:
      self._label(eqn, Kind.CONSTANT)
      self._loops.update((x, self._varies(eqn)) for x in eqn.outvars)
    elif max(kinds) == Kind.WEIGHT and _must_be_data(eqn):
      self._label(eqn, Kind.DATA)
      for x in eqn.invars:
        self._fall_back(x)
    elif max(kinds) == Kind.WEIGHT:
      self._weight_equation(eqn)
    elif Kind.WEIGHT not in kinds:
      self._label(eqn, Kind.DATA)
    else:
      self._label(eqn, Kind.DATA)
      name = eqn.primitive.name
      layer = self._layer_of(eqn, kinds)
      if layer is not None:
        operand = kinds.index(Kind.WEIGHT)
        (out,) = eqn.outvars
        self._add_use(
          number, eqn, layer, operand, eqn.invars[operand], out.aval
        )
      elif name == "scan":
        self._scan(number, eqn, kinds)
      elif name in _REMAT:
        self._remat(number, eqn, kinds)
      else:
        for x in eqn.invars:
          self._fall_back(x)

  def _label(self, eqn: Any, kind: Kind) -> None:
    self._block.kind.update((x, kind) for x in eqn.outvars)

  def _varies(self, eqn: Any) -> tuple[bool, ...]:
    """Returns in which enclosing loops a weight or constant differs."""
    never = (False,) * len(self._lengths)
    inputs = [never] + [self._loops_of(x) for x in eqn.invars]
    return tuple(map(any, zip(*inputs, strict=True)))

  def _loops_of(self, atom: Any) -> tuple[bool, ...]:
    if self._block.kind_of(atom) == Kind.WEIGHT:
      return self._block.weights[atom].loops
    never = (False,) * len(self._lengths)
    if isinstance(atom, core.Literal):
      return never
    return self._loops.get(atom, never)

  # Weights.

  def _weight_equation(self, eqn: Any) -> None:
    block = self._block
    name = eqn.primitive.name
    loops = self._varies(eqn)
    if name == "stop_gradient":
      self._label(eqn, Kind.CONSTANT)
      self._loops[eqn.outvars[0]] = loops
      return
    inputs = [
      block.weights[x] for x in eqn.invars if block.kind_of(x) == Kind.WEIGHT
    ]
    for i, out in enumerate(eqn.outvars):
      if not jnp.issubdtype(out.aval.dtype, jnp.inexact):
        # Integers have no derivative.
        block.kind[out] = Kind.CONSTANT
        self._loops[out] = loops
        continue
      block.kind[out] = Kind.WEIGHT
      block.definition[out] = eqn
      rounded = any(w.rounded for w in inputs) or program.computes_narrow(eqn)
      narrow = name not in _WIDENED and rounded
      block.weights[out] = Weight(
        frozenset().union(*(w.leaves for w in inputs)),
        self._origin(eqn, i, inputs),
        loops,
        narrow or any(w.narrow for w in inputs),
        rounded,
      )

  def _origin(
    self, eqn: Any, i: int, inputs: Sequence[Weight]
  ) -> Origin | None:
    origins = [w.origin for w in inputs if w.origin is not None]
    name = eqn.primitive.name
    if len(origins) != len(eqn.invars):
      return None
    if name in ("concatenate", "stack"):
      leaves = [leaf for o in origins for leaf in o.leaves]
      if len(set(leaves)) < len(leaves):
        return None
      axis = eqn.params.get("dimension", eqn.params.get("axis"))
      steps = ("join", name, axis, tuple(o.steps for o in origins))
      return Origin(frozenset(leaves), (steps,))
    if len(origins) != 1:
      return None
    (origin,) = origins
    if name in _IDENTITIES:
      return origin
    shape = eqn.invars[0].aval.shape
    if name == "slice" and set(eqn.params["strides"] or (1,)) == {1}:
      starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    elif name == "split":
      axis, sizes = eqn.params["axis"], eqn.params["sizes"]
      start = sum(sizes[:i])
      starts = tuple(start * (a == axis) for a in range(len(shape)))
      limits = (*shape[:axis], start + sizes[i], *shape[axis + 1 :])
    elif name == "transpose":
      return origin.then(name, tuple(eqn.params["permutation"]))
    elif name in _ISOMETRIES:
      return origin.then(name, eqn.outvars[i].aval.shape, str(eqn.params))
    else:
      return None
    if tuple(limits) == shape and not any(starts):
      return origin
    return origin.then("slice", tuple(starts), tuple(limits))

  def _fall_back(self, atom: Any) -> None:
    block = self._block
    if block.kind_of(atom) != Kind.WEIGHT:
      return
    # Make it data where it is smallest: a bias before it is broadcast to all
    # positions.
    best = atom
    while atom in block.definition:
      eqn = block.definition[atom]
      inputs = {x for x in eqn.invars if block.kind_of(x) == Kind.WEIGHT}
      if len(inputs) != 1 or len(eqn.outvars) != 1:
        break
      (atom,) = inputs
      if math.prod(atom.aval.shape) <= math.prod(best.aval.shape):
        best = atom
    if best not in block.fallbacks:
      number = -1 - len(block.fallbacks)
      block.fallbacks[best] = number
      layer = self._find_layer(None, 0)
      self._add_use(number, None, layer, 0, best, best.aval)

  # Weight uses, where weights meet data.

  def _layer_of(self, eqn: Any, kinds: Sequence[Kind]) -> Any:
    """Returns the rule of an equation that is a product, or None."""
    if len(kinds) != 2 or len(eqn.outvars) != 1:
      return None
    if kinds.count(Kind.WEIGHT) != 1 or not _is_of_one_range(eqn):
      return None
    operand = kinds.index(Kind.WEIGHT)
    (out,) = eqn.outvars
    if not all(
      jnp.issubdtype(x.aval.dtype, jnp.floating)
      for x in (out, eqn.invars[operand])
    ):
      return None
    return self._find_layer(eqn, operand)

  def _add_use(
    self, number: int, eqn: Any, layer: Any, operand: int, var: Any, out: Any
  ) -> None:
    block = self._block
    block.uses[number] = WeightUse(
      key=(*self._prefix, number),
      eqn=eqn,
      layer=layer,
      operand=operand,
      var=var,
      weight=block.weights[var],
      lengths=self._lengths,
      out=jax.ShapeDtypeStruct(out.shape, out.dtype),
    )

  def _scan(self, number: int, eqn: Any, kinds: list[Kind]) -> None:
    params = eqn.params
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    carry = range(num_consts, num_consts + num_carry)
    length = params["length"]
    if length == 0:
      # Its body never runs, so nothing in it has a gradient.
      for x in eqn.invars:
        self._fall_back(x)
      return
    kinds = [Kind.DATA if i in carry else k for i, k in enumerate(kinds)]

    first_stacked = num_consts + num_carry

    def inner(i: int) -> Weight:
      weight = self._block.weights[eqn.invars[i]]
      mapped = i >= first_stacked
      origin = weight.origin
      if origin is not None and mapped:
        origin = origin.then("iteration")
      return weight._replace(loops=(*weight.loops, mapped), origin=origin)

    body = program.without_calls(params["jaxpr"])
    while True:
      block = _Splitter(
        (*self._prefix, number), (*self._lengths, length), self._find_layer
      ).split(
        Block(
          body,
          tuple(kinds),
          num_data_outs=len(eqn.outvars),
          depth=len(self._lengths),
          loop=length,
          first_stacked=first_stacked,
        ),
        [inner(i) for i, k in enumerate(kinds) if k == Kind.WEIGHT],
        {
          x: (*self._loops_of(eqn.invars[i]), i >= first_stacked)
          for i, x in enumerate(body.jaxpr.invars)
          if kinds[i] == Kind.CONSTANT
        },
      )
      # If a weight that all iterations share became data inside, it would
      # have a gradient for each of them: make it data outside.
      shared = frozenset().union(
        *(
          _inputs_of(block, var)
          for var in block.fallbacks
          if not block.weights[var].loops[-1]
        )
      )
      again = [
        i
        for i, x in enumerate(body.jaxpr.invars)
        if x in shared and kinds[i] == Kind.WEIGHT
      ]
      if not again:
        break
      for i in again:
        kinds[i] = Kind.DATA
    self._enter(number, eqn, kinds, block)

  def _remat(self, number: int, eqn: Any, kinds: list[Kind]) -> None:
    body = program.without_calls(core.ClosedJaxpr(eqn.params["jaxpr"], ()))
    block = _Splitter(
      (*self._prefix, number), self._lengths, self._find_layer
    ).split(
      Block(body, tuple(kinds), len(eqn.outvars), len(self._lengths)),
      [
        self._block.weights[x]
        for x, k in zip(eqn.invars, kinds, strict=True)
        if k == Kind.WEIGHT
      ],
      {
        x: self._loops_of(outer)
        for x, outer, k in zip(
          body.jaxpr.invars, eqn.invars, kinds, strict=True
        )
        if k == Kind.CONSTANT
      },
    )
    self._enter(number, eqn, kinds, block)

  def _enter(
    self, number: int, eqn: Any, kinds: Sequence[Kind], block: Block
  ) -> None:
    self._block.blocks[number] = block
    for x, kind in zip(eqn.invars, kinds, strict=True):
      if kind == Kind.DATA:
        self._fall_back(x)


def _inputs_of(block: Block, var: Any) -> frozenset[Any]:
  if var not in block.definition:
    return frozenset([var])
  return frozenset().union(
    *(
      _inputs_of(block, x)
      for x in block.definition[var].invars
      if block.kind_of(x) == Kind.WEIGHT
    )
  )


def _must_be_data(eqn: Any) -> bool:
  """Returns whether gradients must not be summed before an equation."""
  return program.calls(eqn, "custom_vjp") or any(
    jnp.issubdtype(x.aval.dtype, jnp.complexfloating) for x in eqn.outvars
  )


def _is_of_one_range(eqn: Any) -> bool:
  """Returns whether a product's norms and sums are computed in one dtype."""
  dtypes = [x.aval.dtype for x in (*eqn.invars, *eqn.outvars)]
  floats = [x for x in dtypes if jnp.issubdtype(x, jnp.floating)]
  return len({jnp.promote_types(x, jnp.float32) for x in floats}) == 1

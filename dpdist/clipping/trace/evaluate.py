"""Runs a loss that `split.py` split, forward and back to its parameters.

A tap is a zero that is added where a weight is used: to the output of a
product, or to a weight that becomes data. The gradient of the loss with respect
to all taps takes one backward pass through the activations alone, in which no
gradient of a parameter is formed. Norms and sums need only this gradient and
the data operands that met the weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp

from dpdist.clipping.trace import program
from dpdist.clipping.trace import shards
from dpdist.clipping.trace.program import Block
from dpdist.clipping.trace.program import Kind
from dpdist.clipping.trace.program import WeightUse

PyTree = Any
Key = tuple[int, ...]


def tapped(
  use: WeightUse, weight: jax.Array, operand: jax.Array, tap: Any
) -> jax.Array:
  """Runs a product as the model does, and adds the tap, a zero, to it."""
  values = [operand, weight] if use.operand else [weight, operand]
  (out,) = program.bind(use.eqn, values)
  return out if tap is None else out + tap


class Hooks(NamedTuple):
  """What is done where weights are used."""

  # Runs a product: (use, weight, operand, tap) -> output.
  product: Callable[[WeightUse, jax.Array, jax.Array, Any], jax.Array] = tapped
  # Gathers a shard and its other parts, where it is used.
  gather: Callable[[shards.Shard], jax.Array] = shards.Shard.whole
  # Is applied to a weight where it becomes data.
  on_fallback: Callable[[jax.Array], jax.Array] = lambda weight: weight


_PLAIN = Hooks()


def forward(
  block: Block,
  values: Sequence[Any],
  taps: Mapping[Key, Any],
  hooks: Hooks = _PLAIN,
) -> tuple[list[Any], dict[Key, jax.Array]]:
  """Runs a block on one example.

  Values of weights and constants may be `shards.Shard`s. A use's tap is added
  to its output, and has a leading axis over the iterations in a loop; a use
  without a tap runs unchanged. Returns the outputs, and the data operand of
  every product, by key, with a leading axis for each loop.
  """
  jaxpr = block.jaxpr.jaxpr
  env = dict(zip(jaxpr.constvars, block.jaxpr.consts, strict=True))
  env.update(zip(jaxpr.invars, values, strict=True))
  as_data: dict[Any, Any] = {}
  operands: dict[Key, jax.Array] = {}

  def read_part(atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else env[atom]

  def read(atom: Any) -> Any:
    if isinstance(read_part(atom), shards.Shard):
      env[atom] = hooks.gather(env[atom])
    return read_part(atom)

  def read_data(atom: Any) -> Any:
    if block.kind_of(atom) != Kind.WEIGHT:
      return read(atom)
    if atom not in as_data:
      if atom in block.fallbacks:
        tap = taps.get(block.uses[block.fallbacks[atom]].key)
        weight = hooks.on_fallback(read(atom))
        as_data[atom] = weight if tap is None else weight + tap
      else:
        eqn = block.definition[atom]
        (as_data[atom],) = program.bind(eqn, [read_data(x) for x in eqn.invars])
    return as_data[atom]

  for number, eqn in enumerate(jaxpr.eqns):
    kinds = [block.kind_of(x) for x in (*eqn.invars, *eqn.outvars)]
    if Kind.DATA not in kinds:
      outs = program.bind(eqn, [read(x) for x in eqn.invars])
    elif number in block.uses:
      use = block.uses[number]
      weight = read(eqn.invars[use.operand])
      operand = read(eqn.invars[1 - use.operand])
      operands[use.key] = operand
      outs = [hooks.product(use, weight, operand, taps.get(use.key))]
    elif number in block.blocks:
      inner = block.blocks[number]
      arguments = [
        read_data(x) if kind == Kind.DATA else read_part(x)
        for x, kind in zip(eqn.invars, inner.kinds, strict=True)
      ]
      outs, inner_operands = _inner(eqn, inner, arguments, taps, hooks)
      operands.update(inner_operands)
    else:
      outs = program.bind(eqn, [read_data(x) for x in eqn.invars])
    env.update(zip(eqn.outvars, outs, strict=True))
  n = block.num_data_outs
  outs = [read_data(x) for x in jaxpr.outvars[:n]]
  return outs + [read(x) for x in jaxpr.outvars[n:]], operands


def _inner(
  eqn: Any,
  block: Block,
  values: Sequence[Any],
  taps: Mapping[Key, Any],
  hooks: Hooks,
) -> tuple[list[Any], dict[Key, jax.Array]]:
  """Runs a block inside another one, with that block's own taps."""
  keys = [use.key for use in block.all_uses() if use.key in taps]
  own = {key: taps[key] for key in keys}
  if block.loop is not None:
    return _loop(eqn, block, values, own, hooks)
  return jax.checkpoint(
    lambda values, taps: forward(block, values, taps, hooks),
    prevent_cse=eqn.params["prevent_cse"],
    policy=eqn.params["policy"],
  )(list(values), own)


def _loop(
  eqn: Any,
  body: Block,
  values: Sequence[Any],
  taps: dict[Key, Any],
  hooks: Hooks,
) -> tuple[list[Any], dict[Key, jax.Array]]:
  num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
  gather = lambda x: hooks.gather(x) if isinstance(x, shards.Shard) else x
  # Gathers once for all iterations what is the same in all of them, and what is
  # divided along them.
  consts = [gather(x) for x in values[:num_consts]]
  carry = values[num_consts : num_consts + num_carry]
  stacked = [
    gather(x) if isinstance(x, shards.Shard) and x.divides_rows() else x
    for x in values[num_consts + num_carry :]
  ]

  def step(carry: Any, xs: Any) -> tuple[Any, Any]:
    now, taps_now = xs
    outs, operands = forward(body, [*consts, *carry, *now], taps_now, hooks)
    return outs[:num_carry], (outs[num_carry:], operands)

  carry, (ys, operands) = jax.lax.scan(
    step,
    list(carry),
    (stacked, taps),
    length=body.loop,
    reverse=eqn.params["reverse"],
    unroll=eqn.params["unroll"],
  )
  return [*carry, *ys], operands


def to_parameters(
  block: Block,
  values: Sequence[Any],
  cotangents: Mapping[Key, jax.Array],
) -> list[jax.Array | None]:
  """Takes gradients with respect to weights back to the block's inputs.

  It is linear in the gradients. So it can be called once for a sum over
  examples, or for the gradient of a single example. Values of data are not
  used, the others may be `shards.Shard`s. `cotangents` holds gradients of the
  shape `WeightUse.weight_shape`, by some uses' keys.

  Returns the gradient of each input that is a weight; None for the others. It
  is float32 or wider wherever the weight is computed by moves and casts alone.
  It is whole, even where the weight is a shard.
  """
  jaxpr = block.jaxpr.jaxpr
  values = [shards.whole(x) for x in values]
  inputs = {
    x: value.astype(_wide(value.dtype))
    for x, kind, value in zip(jaxpr.invars, block.kinds, values, strict=True)
    if kind == Kind.WEIGHT
  }
  constants = {
    x: value
    for x, kind, value in zip(jaxpr.invars, block.kinds, values, strict=True)
    if kind == Kind.CONSTANT
  }
  sums: dict[Any, jax.Array] = {}

  def add(var: Any, cotangent: jax.Array) -> None:
    sums[var] = sums[var] + cotangent if var in sums else cotangent

  for use in block.uses.values():
    if use.key in cotangents:
      add(use.var, cotangents[use.key])
  for number, inner in block.blocks.items():
    keys = [s.key for s in inner.all_uses() if s.key in cotangents]
    if not keys:
      continue
    eqn = jaxpr.eqns[number]
    arguments = _arguments(block, eqn, inner, inputs, constants)
    back = to_parameters if inner.loop is None else _back_through_loop
    of_inputs = back(inner, arguments, {k: cotangents[k] for k in keys})
    for x, cotangent in zip(eqn.invars, of_inputs, strict=True):
      if cotangent is not None:
        add(x, cotangent)

  result = {x: sums[x] for x in inputs if x in sums}
  derived = [x for x in sums if x not in inputs]
  if derived:
    of_derived = _back_to_inputs(
      block, inputs, constants, {x: sums[x] for x in derived}
    )
    for x, gradient in zip(inputs, of_derived, strict=True):
      result[x] = result[x] + gradient if x in result else gradient
  return [
    result.get(x, jnp.zeros_like(inputs[x])) if x in inputs else None
    for x in jaxpr.invars
  ]


def _arguments(
  block: Block,
  eqn: Any,
  inner: Block,
  inputs: Mapping[Any, jax.Array],
  constants: Mapping[Any, Any],
) -> list[Any]:
  """Returns the values of an inner block's inputs; None for data."""
  fixed = [
    x
    for x, kind in zip(eqn.invars, inner.kinds, strict=True)
    if kind != Kind.DATA and not isinstance(x, core.Literal)
  ]
  plain = {x: value.astype(x.aval.dtype) for x, value in inputs.items()}
  env = _weights(block, {**constants, **plain}, fixed, wide=False)
  return [
    None
    if kind == Kind.DATA
    else x.val
    if isinstance(x, core.Literal)
    else env[x]
    for x, kind in zip(eqn.invars, inner.kinds, strict=True)
  ]


def _back_to_inputs(
  block: Block,
  inputs: Mapping[Any, jax.Array],
  constants: Mapping[Any, Any],
  sums: Mapping[Any, jax.Array],
) -> list[jax.Array]:
  """Takes gradients of values computed from weights back to the weights.

  Inputs are widened weights; sums are by the variable that they belong to.
  Returns what to add to the gradient of each input.
  """
  names, derived = list(inputs), list(sums)
  narrow = {x for x in derived if block.weights[x].narrow}

  def run(values: list[Any]) -> list[Any]:
    known = {**constants, **dict(zip(names, values, strict=True))}
    wide = _weights(block, known, set(derived) - narrow, wide=True)
    # Values that cannot be widened are computed from the rounded inputs.
    plain = {x: known[x].astype(x.aval.dtype) for x in names}
    env = _weights(block, {**constants, **plain}, narrow, wide=False)
    return [(env if x in narrow else wide)[x] for x in derived]

  outputs, pull = jax.vjp(run, list(inputs.values()))
  (gradients,) = pull(
    [sums[x].astype(out.dtype) for x, out in zip(derived, outputs, strict=True)]
  )
  return gradients


def _back_through_loop(
  body: Block, values: Sequence[Any], cotangents: Mapping[Key, jax.Array]
) -> list[jax.Array | None]:
  """Does the same for a loop; inputs that differ by iteration are stacked."""
  uses = {use.key: use for use in body.all_uses()}
  mapped = {
    key: x
    for key, x in cotangents.items()
    if uses[key].weight.loops[body.depth]
  }
  shared = {key: x for key, x in cotangents.items() if key not in mapped}
  stacked = [
    kind != Kind.DATA and i >= body.first_stacked
    for i, kind in enumerate(body.kinds)
  ]

  def once(
    slices: Sequence[Any], cotangents: Mapping[Key, jax.Array]
  ) -> list[jax.Array | None]:
    now = [
      x if each else whole
      for x, each, whole in zip(slices, stacked, values, strict=True)
    ]
    return to_parameters(body, now, cotangents)

  slices = [
    x if each else None for x, each in zip(values, stacked, strict=True)
  ]
  total: list[jax.Array | None] = [None] * len(values)
  if mapped:
    by_iteration = jax.lax.map(lambda args: once(*args), (slices, mapped))
    total = [
      x if x is None or each else jnp.sum(x, axis=0)
      for x, each in zip(by_iteration, stacked, strict=True)
    ]
  if shared:
    # The iterations' gradients are summed already, so any slice will do. Inputs
    # that differ by iteration have no gradient here.
    first = [None if x is None else x[0] for x in slices]
    for i, x in enumerate(once(first, shared)):
      if x is not None and not stacked[i]:
        before = total[i]
        total[i] = x if before is None else before + x
  return total


def _weights(
  block: Block, inputs: Mapping[Any, Any], wanted: Iterable[Any], *, wide: bool
) -> dict[Any, Any]:
  """Computes the wanted constants and weights of a block, and their ancestors.

  If wide, leaves out casts to narrow floats wherever that is possible.
  """
  jaxpr = block.jaxpr.jaxpr
  needed = set(wanted)
  equations = []
  for eqn in reversed(jaxpr.eqns):
    if needed.intersection(eqn.outvars):
      needed.update(x for x in eqn.invars if not isinstance(x, core.Literal))
      equations.append(eqn)
  env: dict[Any, Any] = dict(
    zip(jaxpr.constvars, block.jaxpr.consts, strict=True)
  )
  env.update(inputs)

  def value(atom: Any) -> Any:
    if isinstance(atom, core.Literal):
      aval: Any = atom.aval
      return jnp.asarray(atom.val, aval.dtype)
    return env[atom]

  for eqn in reversed(equations):
    values = [value(x) for x in eqn.invars]
    is_weight = [
      x in block.weights and not block.weights[x].narrow for x in eqn.outvars
    ]
    changed = {}
    if wide and all(is_weight):
      dtypes = [
        x.dtype for x in values if jnp.issubdtype(x.dtype, jnp.floating)
      ]
      if eqn.primitive.name == "convert_element_type":
        widest = jnp.promote_types(dtypes[0], eqn.params["new_dtype"])
        changed = {"new_dtype": widest}
      elif eqn.primitive.name == "reduce_precision":
        env[eqn.outvars[0]] = values[0]
        continue
      elif len({x.dtype for x in values}) > 1 and dtypes:
        widest = jnp.result_type(*dtypes)
        values = [
          x.astype(widest) if jnp.issubdtype(x.dtype, jnp.floating) else x
          for x in values
        ]
    elif wide:
      # Cast back to the program's dtypes.
      values = [
        v.astype(x.aval.dtype) for v, x in zip(values, eqn.invars, strict=True)
      ]
    env.update(
      zip(eqn.outvars, program.bind(eqn, values, **changed), strict=True)
    )
  return env


def _wide(dtype: Any) -> Any:
  return jnp.promote_types(dtype, jnp.float32)

"""Finds which results of a traced program depend on which of its inputs.

Only the flow of data counts: a value multiplied with 0 is still a dependence.
Loops and branches are followed inside. Every output of an unknown operation
depends on every input. The result of an effect, such as reading a
`jax.new_ref`, depends on everything that was passed to effects before.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from dpdist.clipping.trace import program


def dependent(jaxpr: Any, marked: Sequence[bool]) -> list[bool]:
  """Returns which outputs of a jaxpr, not closed, depend on marked inputs."""
  env = dict(zip(jaxpr.invars, marked, strict=True))

  def read(atom: Any) -> bool:
    return not isinstance(atom, core.Literal) and env.get(atom, False)

  is_outside = False  # Whether something marked was passed to an effect.
  for eqn in jaxpr.eqns:
    inputs = [read(x) for x in eqn.invars]
    if program.effects(eqn):
      is_outside = is_outside or any(inputs)
      env.update((x, is_outside) for x in eqn.outvars)
      continue
    flags = (
      _equation(eqn, inputs) if any(inputs) else [False] * len(eqn.outvars)
    )
    env.update(zip(eqn.outvars, flags, strict=True))
  return [read(x) for x in jaxpr.outvars]


def _equation(eqn: Any, inputs: list[bool]) -> list[bool]:
  everything = [True] * len(eqn.outvars)
  name = eqn.primitive.name
  inner = list(core.jaxprs_in_params(eqn.params))
  if name == "scan":
    return _scan(eqn, inputs)
  if name == "cond" and not inputs[0]:
    branches = [dependent(branch, inputs[1:]) for branch in inner]
    return [any(outs) for outs in zip(*branches, strict=True)]
  # A call: a jit, a rematerialised part or a custom derivative.
  if len(inner) == 1 and name not in ("cond", "while"):
    (body,) = inner
    if len(body.invars) == len(inputs) and len(body.outvars) == len(everything):
      return dependent(body, inputs)
  return everything


def _scan(eqn: Any, inputs: list[bool]) -> list[bool]:
  body = eqn.params["jaxpr"].jaxpr
  first = eqn.params["num_consts"]
  num_carry = eqn.params["num_carry"]
  inputs = list(inputs)
  while True:
    outs = dependent(body, inputs)
    carry = [
      a or b
      for a, b in zip(inputs[first : first + num_carry], outs, strict=False)
    ]
    if carry == inputs[first : first + num_carry]:
      return [*carry, *outs[num_carry:]]
    inputs[first : first + num_carry] = carry

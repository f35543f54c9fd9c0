"""The proofs that this project has, one for each way of sampling.

Each proof is about the Gaussian mechanism on a clipped sum. It returns the
events that are composed, and raises ValueError for settings that it does not
hold for. The events name their papers; the rest is in docs/accounting.md.
"""

import functools

from dpdist import _validation
from dpdist import errors
from dpdist.accounting import gaussian_events
from dpdist.accounting import step_events

# Settings that only some samplings have, and their values for all others.
_DEFAULTS = {
  "truncated_batch_size": None,
  "cycle_length": 1,
  "examples_per_user": 1,
  "group_size": 1,
}


@step_events.proof(sampling="poisson")
def poisson(numbers: step_events.Numbers) -> step_events.Steps:
  """Proves steps in which each row, or group of rows, is drawn by itself."""
  _check_others(numbers, "poisson", "examples_per_user", "group_size")
  if numbers.examples_per_user > 1:
    _check_relation(
      numbers, "examples_per_user above 1", "add_or_remove_one", "zero_out"
    )
    if numbers.group_size > 1:
      raise errors.ArgumentError(
        "group_size must be 1 with examples_per_user above 1, got"
        f" {numbers.group_size}: whose rows are in a group is not known"
      )
  return step_events.by_turns(
    numbers, functools.partial(_drawn_by_itself, numbers)
  )


@step_events.proof(sampling="cyclic_poisson")
def cyclic_poisson(numbers: step_events.Numbers) -> step_events.Steps:
  """Proves Poisson steps over parts of the rows that take turns."""
  _check_others(numbers, "cyclic_poisson", "cycle_length", "group_size")
  return step_events.by_turns(
    numbers, functools.partial(_drawn_by_itself, numbers)
  )


@step_events.proof(sampling="truncated_poisson")
def truncated_poisson(numbers: step_events.Numbers) -> step_events.Steps:
  """Proves Poisson steps whose larger samples are cut."""
  _check_others(numbers, "truncated_poisson", "truncated_batch_size")
  for name in ("truncated_batch_size", "num_examples"):
    _validation.require(
      getattr(numbers, name) is not None,
      name,
      "given with sampling='truncated_poisson'",
      None,
    )
  _check_relation(
    numbers, "sampling='truncated_poisson'", "add_or_remove_one", "zero_out"
  )
  size, limit = numbers.num_examples, numbers.truncated_batch_size
  assert size is not None
  assert limit is not None

  def event_of(sigma: float, q: float) -> step_events.StepEvent:
    if limit >= size:
      return gaussian_events.AddRemove(sigma, q)
    return gaussian_events.Truncated(
      sigma,
      q,
      num_examples=size,
      limit=limit,
      is_in_place=numbers.neighboring_relation == "zero_out",
      is_either=numbers.may_grow,
    )

  return step_events.by_turns(numbers, event_of)


@step_events.proof(sampling="fixed_size")
def fixed_size(numbers: step_events.Numbers) -> step_events.Steps:
  """Proves steps of a fixed number of rows, drawn without replacement."""
  _check_others(numbers, "fixed_size")
  # A row more would be a row less of something else.
  _check_relation(numbers, "sampling='fixed_size'", "replace_one")

  def event_of(sigma: float, q: float) -> step_events.StepEvent:
    if q == 1:  # All rows are always in the sum.
      return gaussian_events.AddRemove(sigma, q)
    return gaussian_events.ReplaceCoupled(sigma, q)

  return step_events.by_turns(numbers, event_of)


def _drawn_by_itself(
  numbers: step_events.Numbers, sigma: float, q: float
) -> step_events.StepEvent:
  """Returns the event of a step in which a unit is drawn by itself."""
  is_replaced = numbers.neighboring_relation == "replace_one"
  if q == 1:  # All rows of a unit are always in the sum: one Gaussian.
    reach = numbers.examples_per_user
    if numbers.group_size > 1 and not is_replaced:
      reach *= 2
    return gaussian_events.AddRemove(sigma / reach, q)
  if numbers.examples_per_user > 1:
    return gaussian_events.Binomial(sigma, q, numbers.examples_per_user)
  if is_replaced:
    # The noise multiplier is in units of twice the clip norm. A row of a group
    # can exchange no more than the whole gradient either.
    return gaussian_events.Replace(2 * sigma, q)
  if numbers.group_size > 1:  # One row can reverse the group's gradient.
    return gaussian_events.Replace(sigma, q)
  return gaussian_events.AddRemove(sigma, q)


def _check_others(
  numbers: step_events.Numbers, sampling: str, *used: str
) -> None:
  """Raises ValueError for a setting that the sampling does not have."""
  for name, default in _DEFAULTS.items():
    value = getattr(numbers, name)
    if name not in used:
      _validation.require(
        value == default, name, f"{default} with sampling={sampling!r}", value
      )
  if numbers.neighboring_relation != "add_or_remove_one":
    return
  for name in ("cycle_length", "group_size"):
    if getattr(numbers, name) > 1:
      raise errors.ArgumentError(
        "neighboring_relation must be 'zero_out' or 'replace_one' with"
        f" {name} above 1, which goes by the numbers of rows: one that is"
        " taken away would move all that follow; got 'add_or_remove_one'"
      )


def _check_relation(
  numbers: step_events.Numbers, where: str, *relations: str
) -> None:
  """Raises ValueError for a neighboring relation that has no proof there."""
  _validation.require(
    numbers.neighboring_relation in relations,
    "neighboring_relation",
    f"{' or '.join(map(repr, relations))} with {where}",
    numbers.neighboring_relation,
  )

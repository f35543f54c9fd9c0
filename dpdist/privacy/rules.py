"""Checks the numbers of a config and of its plan."""

from collections.abc import Mapping, Sequence
import math
import numbers
from typing import Any

from dpdist import _validation
from dpdist import errors
from dpdist import registry
from dpdist import sampling as sampling  # Registers ours.
from dpdist.accounting import gaussian_events
from dpdist.accounting import proofs as proofs  # Registers ours.
from dpdist.accounting import search
from dpdist.accounting import step_events
from dpdist.privacy import schedule
from dpdist.sampling import sampler

# With less, private statistics would alone spend an epsilon of 60 or more.
LEAST_STATISTICS_NOISE = 0.1

_RULES = {
  "target_epsilon": _validation.POSITIVE,
  "expected_batch_size": _validation.POSITIVE,
  "l2_clip_norm": _validation.POSITIVE,
  "noise_multiplier": _validation.real(above=0, at_most=search.MOST_NOISE),
  "statistics_noise_multiplier": _validation.Rule(
    f"0, or in [{LEAST_STATISTICS_NOISE:g}, {search.MOST_NOISE:g}]",
    numbers.Real,
    float,
    lambda x: x == 0 or LEAST_STATISTICS_NOISE <= x <= search.MOST_NOISE,
  ),
  **dict.fromkeys(("delta", "target_delta"), _validation.DELTA),
  **dict.fromkeys(
    ("num_examples", "num_steps", "truncated_batch_size", "cycle_length")
    + ("examples_per_user", "group_size"),
    _validation.COUNT,
  ),
  "accountant": _validation.one_of(("pld", "rdp")),
  "neighboring_relation": _validation.one_of(step_events.NEIGHBORING_RELATIONS),
  "unit": _validation.one_of(("example", "user")),
  **dict.fromkeys(
    ("sampling", "noise", "clipping"),
    _validation.Rule("a name", str, str, bool),
  ),
}

_WITHOUT_OPTIONS = ("gaussian", "fixed")


def check(record: Any) -> None:
  """Checks each attribute of a config or plan, and makes it a plain number."""
  # The fingerprint of a plan must not depend on whether 1 or 1.0 was written.
  _validation.check_fields(record, _RULES)
  for name in ("noise_schedule", "batch_size_schedule"):
    value = schedule.checked(name, getattr(record, name), record.num_steps)
    object.__setattr__(record, name, value)
  for part in ("noise", "clipping"):
    name = f"{part}_options"
    options = _options(name, getattr(record, name))
    object.__setattr__(record, name, options)
    kind = getattr(record, part)
    _validation.require(
      not options or kind not in _WITHOUT_OPTIONS,
      name,
      f"empty with {part}={kind!r}, which has no options",
      dict(options),
    )
  num_units = sampler.num_units(record)
  if record.cycle_length > num_units:
    raise ValueError(
      f"cycle_length must be at most {num_units}, the rows or groups of rows"
      f" that take turns, got {record.cycle_length}"
    )
  largest = record.num_examples / record.cycle_length
  sizes = [x for _, x in record.batch_size_schedule]
  for size in (record.expected_batch_size, *sizes):
    if size > largest:
      over = "num_examples" + (
        f" / cycle_length={largest:g}"
        if record.cycle_length > 1
        else f"={record.num_examples}"
      )
      raise ValueError(
        f"expected_batch_size must be at most {over}, got {size!r}"
      )
  load_code(record.sampling, record.noise, record.clipping)
  # Nothing is called that has no proof.
  step_events.find(record.sampling, record.noise, record.clipping)
  sampling_of(record).check(record)
  # Raises for settings of no mechanism.
  steps(record, [schedule.Phase(0, 1.0, record.expected_batch_size)], 1)


def load_code(sampling: str, noise: str, clipping: str) -> None:
  """Imports code from outside, which brings its proof along."""
  registry.load("sampling", sampling, setting="sampling")
  registry.load("noise", noise, setting="noise")
  registry.load("clipper", clipping, setting="clipping")


def check_names(values: Mapping[str, Any]) -> None:
  """Checks that a plan which was read can be used without importing its code.

  Whoever can write a record must not choose what its readers import.
  """
  defaults = {"sampling": "poisson", "noise": "gaussian", "clipping": "fixed"}
  given = {name: values.get(name, x) for name, x in defaults.items()}
  outside = [x for x in given.values() if isinstance(x, str) and ":" in x]
  if outside and not step_events.is_proven(*given.values()):
    raise errors.ArgumentError(
      "a plan that is read must not name code which this process has not"
      f" imported, or which has no proof, got {', '.join(outside)}: if you"
      " trust it, import its module first (--code=MODULE for a command)"
    )


def steps(
  record: Any, phases: Sequence[schedule.Phase], num_steps: int
) -> step_events.Steps:
  """Returns what the accountants compose for steps of a config or a plan."""
  probability = sampling_of(record).probability
  # A neighbour has one row more or one less.
  may_grow = record.neighboring_relation == "add_or_remove_one"
  facts = step_events.Numbers(
    phases=tuple(
      step_events.Phase(
        phase.start,
        phase.noise_multiplier,
        probability(record, phase.expected_batch_size),
      )
      for phase in phases
    ),
    num_steps=num_steps,
    neighboring_relation=record.neighboring_relation,
    num_examples=record.num_examples + may_grow,
    truncated_batch_size=record.truncated_batch_size,
    cycle_length=record.cycle_length,
    examples_per_user=record.examples_per_user,
    group_size=record.group_size,
    may_grow=may_grow,
    noise_options=record.noise_options,
    clipping_options=record.clipping_options,
  )
  found = step_events.steps(
    facts,
    sampling=record.sampling,
    noise=record.noise,
    clipping=record.clipping,
  )
  sigma = record.statistics_noise_multiplier
  if not (sigma and num_steps):
    return found
  event = _statistics_event(sigma / record.examples_per_user, found)
  return [*found, (event, 1)]


def _statistics_event(
  sigma: float, steps: step_events.Steps
) -> step_events.StepEvent:
  """Returns the event of the private statistics, which come with any step.

  They are one Gaussian release of which every unit is a part. Each row of a
  unit moves the sums by at most the l2 sensitivity that the noise is for, which
  is twice the bound of a row for "replace_one". It is the same event in any
  unit; dp_accounting wants it in that of the steps.

  Args:
    sigma: standard deviation of the noise, over how far a unit can move them.
    steps: the others.
  """
  if any(isinstance(event, gaussian_events.Replace) for event, _ in steps):
    return gaussian_events.Replace(2 * sigma, 1.0)
  return gaussian_events.AddRemove(sigma, 1.0)


def _options(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
  """Returns options as pairs in the order of their names."""
  try:
    options = dict(value)
  except (TypeError, ValueError):
    options = {"": None}
  is_plain = all(
    isinstance(key, str)
    and key
    and isinstance(x, bool | int | float | str)
    and (isinstance(x, str) or math.isfinite(x))
    for key, x in options.items()
  )
  _validation.require(
    is_plain, name, "a dict of finite numbers, texts and booleans", value
  )
  return tuple(sorted(options.items()))


def sampling_of(record: Any) -> sampler.Sampling:
  """Returns the sampling of a config or a plan."""
  return registry.resolve("sampling", record.sampling, setting="sampling")()

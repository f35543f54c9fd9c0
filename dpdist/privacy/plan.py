"""The numbers that a run is bound to, fixed before its first step.

You write a `PrivacyConfig`; `make_plan` turns it into a `PrivacyPlan`. The
sampler, the clipping and the noise are built from the plan, the ledger records
it, and a restarted run is compared with it. Neither imports jax. The
accountants are imported only when an epsilon is computed, since they import
scipy, which takes longer to load than a ledger.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from dpdist import errors
from dpdist.accounting import search
from dpdist.accounting import step_events
from dpdist.privacy import rules
from dpdist.privacy import schedule
from dpdist.sampling import sampler

if TYPE_CHECKING:
  import dp_accounting


# What a guarantee is about: a run must not change it.
IMMUTABLE_FIELDS = (
  "delta",
  "neighboring_relation",
  "unit",
  "examples_per_user",
)


# Pairs of name and value, as plans are compared and hashed; given as a dict.
Options: TypeAlias = Mapping[str, Any] | tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MechanismSettings:
  """What a step does, in a config as in its plan.

  Sampling, noise and clipping must have a proof together.

  Attributes:
    sampling: "poisson"; "truncated_poisson", whose draws are cut to
      `truncated_batch_size`; "cyclic_poisson", which draws from `cycle_length`
      parts of the rows in turn; or "fixed_size", which draws without
      replacement, anew at each step, and needs "replace_one"; or
      "package.module:attribute", see `dpdist.sampling.sampler.Sampling`.
    truncated_batch_size: most rows in a step; only for "truncated_poisson".
    cycle_length: number of parts; only for "cyclic_poisson".
    examples_per_user: most rows that one protected person may have, each drawn
      independently; at least 1.
    group_size: how many consecutive rows are averaged and clipped as one; at
      least 1. Each row is protected, although one row can reverse its group's
      gradient. Neither groups nor cycles go with "add_or_remove_one": see
      `dpdist.accounting.proofs`.
    noise_schedule: pairs (step, noise_multiplier), each of which holds from its
      step on; steps rise. Not with a target epsilon.
    batch_size_schedule: pairs (step, expected_batch_size), in the same way.
    unit: what a row is: "example" or "user".
    noise: "gaussian", or "package.module:attribute", see
      `dpdist.noise.noise_mechanism.NoiseMechanism`.
    noise_options: its options, as a dict: numbers, texts and booleans by name.
    clipping: "fixed", or "package.module:attribute", see
      `dpdist.clipping.Clipper`.
    clipping_options: its options, likewise.
    statistics_noise_multiplier: noise standard deviation over l2 sensitivity of
      the private statistics of the data set, which are released once a plan;
      see `dpdist.data.Options`. 0: there are none.
  """

  sampling: str = "poisson"
  truncated_batch_size: int | None = None
  cycle_length: int = 1
  examples_per_user: int = 1
  group_size: int = 1
  noise_schedule: schedule.Schedule = ()
  batch_size_schedule: schedule.Schedule = ()
  unit: str = "example"
  noise: str = "gaussian"
  noise_options: Options = ()
  clipping: str = "fixed"
  clipping_options: Options = ()
  statistics_noise_multiplier: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyConfig(MechanismSettings):
  """The privacy settings of a run, as you write them.

  Give exactly one of `target_epsilon` and `noise_multiplier`; the other
  follows from it.

  Attributes, beside those of `MechanismSettings`:
    num_examples: rows of the training set, a public number.
    expected_batch_size: mean number of rows in a step, above 0 and at most
      `num_examples`; must be whole only with sampling="fixed_size".
    num_steps: number of noisy updates, at least 1.
    l2_clip_norm: bound on the l2 norm of one example's gradient, above 0.
    target_delta: in (0, 1); customarily well below 1 / `num_examples`.
    target_epsilon: the budget that the noise is calibrated to, above 0.
    noise_multiplier: noise standard deviation over l2 sensitivity, above 0.
    accountant: "pld" or "rdp", see `dpdist.accounting.calibration`.
    neighboring_relation: "add_or_remove_one", "replace_one" (doubles the l2
      sensitivity) or "zero_out" (a row is replaced by one that contributes
      nothing).

  Raises:
    ValueError: if an attribute is out of its range, or if no mechanism with a
      proof has these settings; see `dpdist.accounting.proofs`.
  """

  num_examples: int
  expected_batch_size: float
  num_steps: int
  l2_clip_norm: float
  target_delta: float
  target_epsilon: float | None = None
  noise_multiplier: float | None = None
  accountant: str = "pld"
  neighboring_relation: str = "add_or_remove_one"

  def __post_init__(self) -> None:
    rules.check(self)
    if (self.target_epsilon is None) == (self.noise_multiplier is None):
      raise ValueError(
        "exactly one of target_epsilon and noise_multiplier must be given, got "
        f"target_epsilon={self.target_epsilon!r} and "
        f"noise_multiplier={self.noise_multiplier!r}"
      )
    if self.noise_schedule and self.noise_multiplier is None:
      raise ValueError(
        "noise_schedule must be empty with target_epsilon, which calibrates one"
        f" noise multiplier for all steps, got {self.noise_schedule}"
      )

  def to_dict(self) -> dict[str, Any]:
    """Returns a JSON-able dict without attributes that have their default."""
    return _to_dict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyPlan(MechanismSettings):
  """The numbers that a run is bound to; `make_plan` makes it.

  Attributes, beside those of `MechanismSettings`:
    num_examples: rows of the training set.
    expected_batch_size: mean number of rows in a step, a float.
    num_steps: number of noisy updates that the plan covers.
    l2_clip_norm: bound on the l2 norm of one example's gradient.
    noise_multiplier: noise standard deviation over l2 sensitivity.
    delta: the delta at which epsilon is computed.
    accountant: "pld" or "rdp".
    neighboring_relation: see `PrivacyConfig`.
    target_epsilon: the epsilon that the noise was calibrated to; None if the
      noise multiplier was given.
  """

  num_examples: int
  expected_batch_size: float
  num_steps: int
  l2_clip_norm: float
  noise_multiplier: float
  delta: float
  accountant: str
  neighboring_relation: str
  target_epsilon: float | None

  def __post_init__(self) -> None:
    rules.check(self)

  @property
  def sampling_probability(self) -> float:
    """Returns the probability of each row at step 0, in (0, 1].

    With "cyclic_poisson" it is that of a row whose part has its turn.
    """
    return self.probability(self.phases[0])

  def probability(self, phase: schedule.Phase) -> float:
    """Returns the sampling probability of each row under a phase."""
    sampling = rules.sampling_of(self)
    return sampling.probability(self, phase.expected_batch_size)

  @property
  def num_units(self) -> int:
    """Returns the number of rows, or groups of rows, to draw from."""
    return sampler.num_units(self)

  @property
  def phases(self) -> tuple[schedule.Phase, ...]:
    """Returns the phases in order of steps; one if nothing changes."""
    noise, sizes = dict(self.noise_schedule), dict(self.batch_size_schedule)
    found = [schedule.Phase(0, self.noise_multiplier, self.expected_batch_size)]
    for start in sorted({*noise, *sizes}):
      _, sigma, size = found[-1]
      found.append(
        schedule.Phase(start, noise.get(start, sigma), sizes.get(start, size))
      )
    return tuple(found)

  def phase(self, step: int) -> schedule.Phase:
    """Returns the phase at a step of the plan, counted from 0."""
    return [found for found in self.phases if found.start <= step][-1]

  def steps(self, num_steps: int | None = None) -> step_events.Steps:
    """Returns what the accountants compose for the first steps of the plan.

    Args:
      num_steps: at least 0; None means all of the plan's. Beyond them the last
        phase holds.
    """
    stop = self.num_steps if num_steps is None else num_steps
    return rules.steps(self, self.phases, stop)

  def epsilon(self, num_steps: int | None = None) -> float:
    """Returns the epsilon, at `delta`, of a run that stops after some steps.

    It is that of all the plan's steps, since the decision to stop may depend on
    what the run released (Rogers et al. 2016, arXiv:1605.08294). `curve`
    returns that of a number of steps that was fixed beforehand.

    Args:
      num_steps: in [0, `self.num_steps`]; None means all of them.

    Raises:
      ValueError: if the plan does not cover that many steps.
    """
    begun = min(self._covered(num_steps), 1) * self.num_steps
    return self.curve([self.delta], begun)[0]

  def curve(
    self, deltas: Sequence[float], num_steps: int | None = None
  ) -> list[float]:
    """Returns the epsilons of the first steps at several deltas.

    They hold if the number of steps was fixed before the first one.

    Args:
      deltas: each in (0, 1).
      num_steps: in [0, `self.num_steps`]; None means all of them.

    Raises:
      ValueError: if an argument is out of its range.
    """
    from dpdist.accounting import accountants

    steps = self.steps(self._covered(num_steps))
    for delta in deltas:
      if not (schedule.is_a(numbers.Real, delta) and 0 < delta < 1):
        raise ValueError(f"deltas must be in (0, 1), got {delta!r}")
    return [accountants.epsilon(steps, x, self.accountant) for x in deltas]

  def event(self, num_steps: int | None = None) -> "dp_accounting.DpEvent":
    """Returns the same steps as an event for dp_accounting's accountants.

    Args:
      num_steps: in [0, `self.num_steps`]; None means all of them.

    Raises:
      ValueError: if the plan does not cover that many steps.
    """
    from dpdist.accounting import accountants

    return accountants.event(self.steps(self._covered(num_steps)))

  def to_dict(self) -> dict[str, Any]:
    """Returns a dict that JSON carries without loss.

    Attributes that have their default are left out, so that plans made before
    an attribute existed are unchanged.
    """
    return _to_dict(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "PrivacyPlan":
    """Returns the plan that `to_dict` turned into these values.

    Code that they name is not imported: import it before.

    Raises:
      ValueError: if a key is missing, or unknown, or a value out of its range,
        or if they name code that was not imported.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    needed = known - _defaults(cls).keys()
    missing, unknown = needed - values.keys(), values.keys() - known
    if missing or unknown:
      raise ValueError(
        f"a plan must have the keys {sorted(needed)} and of others only"
        f" {sorted(known - needed)}, got {sorted(missing)} missing and"
        f" {sorted(unknown)} unknown"
      )
    rules.check_names(values)
    return cls(**values)

  def fingerprint(self) -> str:
    """Returns SHA-256 of the plan as canonical JSON, hex."""
    text = json.dumps(
      self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()

  def _covered(self, num_steps: int | None) -> int:
    if num_steps is None:
      return self.num_steps
    if (
      schedule.is_a(numbers.Integral, num_steps)
      and 0 <= num_steps <= self.num_steps
    ):
      return int(num_steps)
    raise ValueError(
      f"num_steps must be an integer in [0, {self.num_steps}], which the plan "
      f"covers, got {num_steps!r}"
    )


class PlanUse(NamedTuple):
  """Steps under one plan."""

  plan: PrivacyPlan
  num_steps: int  # At least 0.


def make_plan(config: PrivacyConfig) -> PrivacyPlan:
  """Returns the plan of a config.

  With a `target_epsilon`, the noise multiplier is the least one of six
  significant digits under which all of the steps spend at most that; see
  `accounting.calibrate_noise_multiplier`.

  Raises:
    ValueError: if no noise multiplier reaches the target.
  """
  values = _to_dict(config)
  values["delta"] = values.pop("target_delta")
  draft = PrivacyPlan(**values | {"noise_multiplier": 1.0})
  noise_multiplier = config.noise_multiplier
  if config.target_epsilon is not None:
    from dpdist.accounting import calibration

    noise_multiplier = calibration.least_noise_multiplier(
      lambda sigma: dataclasses.replace(draft, noise_multiplier=sigma).steps(),
      target_epsilon=config.target_epsilon,
      delta=config.target_delta,
      accountant=config.accountant,
    )
  assert noise_multiplier is not None  # A config has one of the two.
  plan = dataclasses.replace(draft, noise_multiplier=noise_multiplier)
  for _, sigma, _ in plan.phases:
    if sigma < search.NO_NOISE:
      raise ValueError(
        f"noise_multiplier must be at least {search.NO_NOISE:g}, below which"
        f" epsilon is infinite, got {sigma}"
      )
  loose = [event.loose_rdp for event, _ in plan.steps() if event.loose_rdp]
  if plan.accountant == "rdp" and loose:
    raise errors.ArgumentError(
      f"accountant must be 'pld' with {loose[0]}, got 'rdp'"
    )
  return plan


def _defaults(cls: type) -> dict[str, Any]:
  return {
    field.name: field.default
    for field in dataclasses.fields(cls)
    if field.default is not dataclasses.MISSING
  }


def _to_dict(record: PrivacyConfig | PrivacyPlan) -> dict[str, Any]:
  # A plan's required attributes, and a config's counterparts, are always kept.
  kept = {field.name for field in dataclasses.fields(PrivacyPlan)}
  kept -= _defaults(PrivacyPlan).keys()
  kept |= {"target_delta"}
  defaults = _defaults(type(record))
  return {
    name: _json_able(name, value)
    for name, value in dataclasses.asdict(record).items()
    if name in kept or value != defaults[name]
  }


def _json_able(name: str, value: Any) -> Any:
  if name.endswith("_schedule"):
    return [*map(list, value)]  # JSON reads tuples back as lists.
  return dict(value) if name.endswith("_options") else value

"""The numbers that a run is bound to, fixed before its first step.

A `PrivacyConfig` is what a user writes; `make_plan` turns it into the
`PrivacyPlan` that the sampler, the clipping and the noise are built from, that
the ledger records, and that a restarted run is held against. Neither imports
jax, nor, until an epsilon is asked for, the accountants: they bring scipy,
which takes longer to load than a ledger.
"""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import json
import math
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

from dpdist import search

if TYPE_CHECKING:
  import dp_accounting


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
  """What a run should be, in the user's terms.

  Exactly one of `target_epsilon` and `noise_multiplier` is given; the other
  follows from it.

  Attributes:
    num_examples: size of the training set, a public number.
    expected_batch_size: mean of the number of examples in a step, above 0 and
      at most `num_examples`; it need not be whole.
    num_steps: number of noisy updates, at least 1.
    l2_clip_norm: bound on the l2 norm of one example's gradient, above 0.
    target_delta: in (0, 1); customarily well below 1 / `num_examples`.
    target_epsilon: the budget that the noise is calibrated to, above 0.
    noise_multiplier: noise standard deviation over l2 sensitivity, above 0.
    accountant: "pld" or "rdp", see `dpdist.accounting`.
    neighboring_relation: "add_or_remove_one".
    unit: "example" or "user", what is counted above and protected.

  Raises:
    ValueError: if an attribute is out of its range.
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
  unit: str = "example"

  def __post_init__(self) -> None:
    _check(self)
    if (self.target_epsilon is None) == (self.noise_multiplier is None):
      raise ValueError(
        "exactly one of target_epsilon and noise_multiplier must be given, got "
        f"target_epsilon={self.target_epsilon!r} and "
        f"noise_multiplier={self.noise_multiplier!r}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
  """What a run is bound to; made by `make_plan`.

  Attributes:
    num_examples: size of the training set.
    expected_batch_size: what the noisy sum is divided by; float.
    num_steps: number of noisy updates that the plan covers.
    l2_clip_norm: bound on the l2 norm of one example's gradient.
    noise_multiplier: noise standard deviation over l2 sensitivity.
    delta: at which epsilon is meant.
    accountant: "pld" or "rdp".
    neighboring_relation: "add_or_remove_one".
    target_epsilon: what the noise was calibrated to; None if it was given.
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
  unit: str = "example"

  def __post_init__(self) -> None:
    _check(self)

  @property
  def sampling_probability(self) -> float:
    """With which each example is drawn at each step, in (0, 1]."""
    return self.expected_batch_size / self.num_examples

  def epsilon(self, num_steps: int | None = None) -> float:
    """Returns the epsilon spent at `delta` by the first steps of the plan.

    Args:
      num_steps: in [0, `self.num_steps`]; None means all of them.

    Raises:
      ValueError: if the plan does not cover that many steps.
    """
    from dpdist import accounting

    return accounting.epsilon(
      noise_multiplier=self.noise_multiplier,
      sampling_probability=self.sampling_probability,
      num_steps=self._covered(num_steps),
      delta=self.delta,
      accountant=self.accountant,
    )

  def event(self, num_steps: int | None = None) -> "dp_accounting.DpEvent":
    """Returns the same steps as an event for dp_accounting's accountants.

    Args:
      num_steps: in [0, `self.num_steps`]; None means all of them.

    Raises:
      ValueError: if the plan does not cover that many steps.
    """
    from dpdist import accounting

    return accounting.training_event(
      noise_multiplier=self.noise_multiplier,
      sampling_probability=self.sampling_probability,
      num_steps=self._covered(num_steps),
    )

  def to_dict(self) -> dict[str, Any]:
    """Returns a dict that JSON carries without loss."""
    values = dataclasses.asdict(self)
    if self.unit == "example":
      del values["unit"]
    return values

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "PrivacyPlan":
    """Returns the plan that `to_dict` was called on.

    Raises:
      ValueError: if a key is missing, or unknown, or a value out of its range.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    missing = known - values.keys() - {"unit"}
    unknown = values.keys() - known
    if missing or unknown:
      raise ValueError(
        f"a plan must have the keys {sorted(known)} and no other, got "
        f"{sorted(missing)} missing and {sorted(unknown)} unknown"
      )
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
    if _is(numbers.Integral, num_steps) and 0 <= num_steps <= self.num_steps:
      return int(num_steps)
    raise ValueError(
      f"num_steps must be an integer in [0, {self.num_steps}], which the plan "
      f"covers, got {num_steps!r}"
    )


class Part(NamedTuple):
  """Steps under one plan.

  Attributes:
    plan: their numbers.
    num_steps: how many there are, at least 0.
  """

  plan: PrivacyPlan
  num_steps: int


def make_plan(config: PrivacyConfig) -> PrivacyPlan:
  """Returns the plan that a config comes to.

  With a `target_epsilon`, the noise multiplier is the least one of six
  significant digits under which all of the steps spend at most that; see
  `accounting.calibrate_noise_multiplier`.

  Raises:
    ValueError: if no noise multiplier reaches the target.
  """
  noise_multiplier = config.noise_multiplier
  if config.target_epsilon is not None:
    from dpdist import accounting

    noise_multiplier = accounting.calibrate_noise_multiplier(
      target_epsilon=config.target_epsilon,
      delta=config.target_delta,
      sampling_probability=config.expected_batch_size / config.num_examples,
      num_steps=config.num_steps,
      accountant=config.accountant,
    )
  assert noise_multiplier is not None  # One of the two was given.
  if noise_multiplier < search.NO_NOISE:
    raise ValueError(
      f"noise_multiplier must be at least {search.NO_NOISE:g}, below which"
      f" epsilon is infinite, got {noise_multiplier}"
    )
  return PrivacyPlan(
    num_examples=config.num_examples,
    expected_batch_size=config.expected_batch_size,
    num_steps=config.num_steps,
    l2_clip_norm=config.l2_clip_norm,
    noise_multiplier=noise_multiplier,
    delta=config.target_delta,
    accountant=config.accountant,
    neighboring_relation=config.neighboring_relation,
    target_epsilon=config.target_epsilon,
    unit=config.unit,
  )


def statement(plan: PrivacyPlan) -> str:
  """Returns what the plan guarantees, and when, in plain words."""
  return (
    f"The unit of privacy is one example of the {plan.num_examples:,} in the "
    "training set: whoever sees everything that training releases can hardly "
    "tell whether any one of them was there (neighboring relation "
    f"{plan.neighboring_relation}). "
    "At each step every example is drawn, apart from all others (Poisson "
    f"sampling), with probability q = {plan.expected_batch_size:g} / "
    f"{plan.num_examples:,} = {plan.sampling_probability:.6g}, gradients are "
    f"clipped to l2 norm {plan.l2_clip_norm}, and Gaussian noise of "
    f"{plan.noise_multiplier} times the l2 sensitivity is added to their sum. "
    f"All {plan.num_steps:,} steps together are (epsilon, delta)-"
    "differentially private with epsilon = "
    f"{rounded_up(plan.epsilon())} and delta = {plan.delta:g}, by "
    f"dp-accounting's {plan.accountant.upper()} accountant. "
    "This holds if nobody's data is in more than one example, if the draws and "
    "the noise stay secret, and if nothing else that was computed from the "
    "data is released. "
    "It does not cover choices made by looking at the data, such as trying "
    "several settings and keeping the best."
  )


def rounded_up(epsilon: float) -> str:
  """Returns four significant digits, not below the number itself."""
  if epsilon == 0 or math.isinf(epsilon):
    return f"{epsilon:g}"
  unit = 10.0 ** (math.floor(math.log10(epsilon)) - 3)
  return f"{math.ceil(epsilon / unit) * unit:.4g}"


_REAL, _WHOLE = (float, numbers.Real), (int, numbers.Integral)
_POSITIVE = (_REAL, lambda x: 0 < x < math.inf, "finite and > 0")
_COUNT = (_WHOLE, lambda x: x >= 1, "an integer >= 1")
_DELTA = (_REAL, lambda x: 0 < x < 1, "in (0, 1)")

# What an attribute is turned into and from, what holds of it, and how to say
# so. Nothing holds of NaN.
_RULES: dict[str, tuple[tuple[Any, Any], Callable[[Any], bool], str]] = {
  "num_examples": _COUNT,
  "expected_batch_size": _POSITIVE,
  "num_steps": _COUNT,
  "l2_clip_norm": _POSITIVE,
  "target_delta": _DELTA,
  "delta": _DELTA,
  "target_epsilon": _POSITIVE,
  "noise_multiplier": _POSITIVE,
  "accountant": ((str, str), lambda x: x in ("pld", "rdp"), "'pld' or 'rdp'"),
  "neighboring_relation": (
    (str, str),
    lambda x: x == "add_or_remove_one",
    "'add_or_remove_one'",
  ),
  "unit": (
    (str, str),
    lambda x: x in ("example", "user"),
    "'example' or 'user'",
  ),
}


def _check(record: PrivacyConfig | PrivacyPlan) -> None:
  """Holds each attribute against its rule, and makes it a plain number."""
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    if value is None and field.type == float | None:
      continue
    (plain, kind), holds, right = _RULES[field.name]
    if not _is(kind, value) or not holds(plain(value)):
      raise ValueError(f"{field.name} must be {right}, got {value!r}")
    # The same plan must have the same fingerprint, written 1 or 1.0.
    object.__setattr__(record, field.name, plain(value))
  if record.expected_batch_size > record.num_examples:
    raise ValueError(
      f"expected_batch_size must be at most num_examples="
      f"{record.num_examples}, got {record.expected_batch_size!r}"
    )


def _is(kind: Any, value: Any) -> bool:
  return isinstance(value, kind) and not isinstance(value, bool)

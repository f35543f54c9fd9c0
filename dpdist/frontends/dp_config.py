"""A short way to a plan, in the terms of Keras users.

    config = dpdist.DPConfig(
      epsilon=2.0, delta=1e-6, clipping_norm=1.0, batch_size=32,
      gradient_accumulation_steps=8, train_steps=1_000, train_size=60_000)
    plan = config.make_plan()

A step is a noisy update, however many mini-batches its gradients were added up
from, and its examples are one draw of `effective_batch_size` on average: this
is what the accountant counts. Imports no jax.
"""

import dataclasses
from typing import Any

from dpdist import _validation
from dpdist import errors
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import statement

_RULES = {
  "epsilon": _validation.POSITIVE,
  "delta": _validation.DELTA._replace(
    text="in (0, 1): with 1 anything at all is private"
  ),
  "clipping_norm": _validation.POSITIVE,
  "batch_size": _validation.COUNT,
  "gradient_accumulation_steps": _validation.COUNT,
  "train_steps": _validation.COUNT,
  "train_size": _validation.COUNT,
  "poisson_sampling_in_fit": _validation.FLAG,
  "noise_multiplier": _validation.POSITIVE,
  "rescale_to_unit_norm": _validation.FLAG,
  "microbatch_size": _validation.COUNT,
  "seed": _validation.integer(0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPConfig:
  """The settings and the budget of a `fit`.

  Attributes:
    epsilon: the budget of all of train_steps, above 0.
    delta: in (0, 1); customarily well below 1 / train_size.
    clipping_norm: bound on the l2 norm of one example's gradient, above 0.
    batch_size: examples of a mini-batch on average.
    gradient_accumulation_steps: mini-batches of an update.
    train_steps: updates: not mini-batches.
    train_size: examples in the training set, a public number.
    poisson_sampling_in_fit: whether each example is drawn for each update
      independently of all others. Otherwise exactly effective_batch_size
      examples are drawn without replacement, and the guarantee is for replacing
      one example by another.
    noise_multiplier: noise standard deviation over l2 sensitivity. None: the
      least that epsilon allows. A given value that spends more is an error.
    rescale_to_unit_norm: whether to divide gradients and noise by
      clipping_norm.
    microbatch_size: how many per-example gradients are computed at once. None:
      chosen automatically.
    seed: fixes all randomness, for tests: a guarantee needs a secret. None: a
      secret from the operating system. Not shown in the repr.

  Raises:
    ValueError: names the attribute, its value and what would be right.
  """

  epsilon: float
  delta: float
  clipping_norm: float
  batch_size: int
  gradient_accumulation_steps: int = 1
  train_steps: int
  train_size: int
  poisson_sampling_in_fit: bool = True
  noise_multiplier: float | None = None
  rescale_to_unit_norm: bool = False
  microbatch_size: int | None = None
  seed: int | None = dataclasses.field(default=None, repr=False)

  def __post_init__(self) -> None:
    _validation.check_fields(self, _RULES)
    _check_at_most("batch_size", self.batch_size, "train_size", self.train_size)
    _check_at_most(
      "effective_batch_size = batch_size * gradient_accumulation_steps",
      self.effective_batch_size,
      "train_size",
      self.train_size,
    )
    if self.microbatch_size is not None:
      _check_at_most(
        "microbatch_size", self.microbatch_size, "batch_size", self.batch_size
      )
    if self.noise_multiplier is not None:
      spent = self.make_plan().epsilon()
      if not spent <= self.epsilon:
        raise errors.ArgumentError(
          f"noise_multiplier must be large enough for epsilon={self.epsilon},"
          f" got {self.noise_multiplier}, with which {self.train_steps} steps"
          f" spend {statement.rounded_up(spent)}"
        )

  @property
  def effective_batch_size(self) -> int:
    """Returns the examples of an update on average."""
    return self.batch_size * self.gradient_accumulation_steps

  def to_privacy_config(self) -> plan_lib.PrivacyConfig:
    """Returns the same settings as a PrivacyConfig."""
    given = self.noise_multiplier
    return plan_lib.PrivacyConfig(
      num_examples=self.train_size,
      expected_batch_size=self.effective_batch_size,
      num_steps=self.train_steps,
      l2_clip_norm=self.clipping_norm,
      target_delta=self.delta,
      target_epsilon=self.epsilon if given is None else None,
      noise_multiplier=given,
      **_sampling(self.poisson_sampling_in_fit),
    )

  def make_plan(self) -> plan_lib.PrivacyPlan:
    """Returns the plan of a run, which spends at most epsilon.

    Raises:
      ValueError: no noise is enough.
    """
    return plan_lib.make_plan(self.to_privacy_config())

  def clipping_options(self) -> dict[str, Any]:
    """Returns the other settings.

    They are options of `dpdist.clipped_grad` and `dpdist.private_gradients`.
    """
    return {
      "l2_clip_norm": self.clipping_norm,
      "rescale_to_unit_norm": self.rescale_to_unit_norm,
      "microbatch_size": self.microbatch_size,
    }


def _sampling(is_poisson: bool) -> dict[str, Any]:
  """Returns the fields of a PrivacyConfig that say how examples are drawn."""
  if is_poisson:
    return {}
  return {"sampling": "fixed_size", "neighboring_relation": "replace_one"}


def _check_at_most(name: str, value: int, limit_name: str, limit: int) -> None:
  rule = f"at most {limit_name}={limit}"
  _validation.require(value <= limit, name, rule, value)

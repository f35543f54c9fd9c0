"""Connects what a run does to what its accountants compose.

Settings name how a run samples, clips and adds noise. A proof says what a unit
loses by that. It is registered for one sampling, one noise and one clipper
together:

    @step_events.proof(sampling="poisson", noise="gaussian", clipper="fixed")
    def poisson(numbers):
      ...  # Raises for numbers that it does not hold for.
      return [(event, count), ...]

Settings without a proof are refused: no proof, no run. A proof returns events,
and how often each is composed. An event is what a step can tell of a unit.
Accountants know events only by the interface `StepEvent`. Our events are in
`dpdist.accounting.gaussian_events`, our proofs in `dpdist.accounting.proofs`.

Imports no jax, no accountant and no scipy.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from dpdist import _validation
from dpdist import errors
from dpdist import registry

if TYPE_CHECKING:
  import dp_accounting
  import numpy as np

  from dpdist.accounting import mixtures

NEIGHBORING_RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")


class StepEvent(Protocol):
  """What a step can tell of a unit. It is hashable: equal ones are counted.

  Guarantees, on which epsilon rests:
    Whatever was released before, a step makes two neighbouring data sets no
    easier to tell apart than the distributions of `pld` are, and no easier than
    the divergences of `rdp` and the distance of `total_variation` say.
  """

  @property
  def is_noisy(self) -> bool:
    """Returns whether there is noise; without it, epsilon is infinite."""

  @property
  def loose_rdp(self) -> str:
    """Returns the setting for which `rdp` is too loose to be offered, or ""."""

  def rdp(self) -> "tuple[np.ndarray, np.ndarray]":
    """Returns `rdp.ORDERS`, and bounds on the Renyi divergences at them."""

  def pld(self) -> "tuple[mixtures.Direction, ...]":
    """Returns dominating pairs; one of them holds for all steps of a run."""

  def has_grid(self, count: int) -> bool:
    """Returns whether `pld` is precise enough to compose so many steps."""

  def total_variation(self, count: int) -> float:
    """Bounds delta at every epsilon after so many steps."""

  def dp_event(self) -> "dp_accounting.DpEvent":
    """Returns the event for dp_accounting's own accountants."""


Steps: TypeAlias = Sequence[tuple[StepEvent, int]]


class Phase(NamedTuple):
  """The numbers that hold from a step on."""

  start: int  # The first such step, counted from 0.
  # Noise standard deviation over the l2 sensitivity of the clipped sum under
  # the relation, which for "replace_one" is twice the clip norm; see
  # `dpdist.clipping.ClippedGrad.sensitivity`.
  noise_multiplier: float
  # The probability that a row takes part in a step, if it is in turn; with
  # "fixed_size" the sample size over the number of rows.
  sampling_probability: float


_RULES = {
  "neighboring_relation": _validation.one_of(NEIGHBORING_RELATIONS),
  **dict.fromkeys(
    ("num_examples", "truncated_batch_size", "cycle_length")
    + ("examples_per_user", "group_size"),
    _validation.COUNT,
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
  """The public numbers of a run that a proof is about.

  Attributes:
    phases: in order of steps; the first one starts at step 0.
    num_steps: the number of steps, at least 0.
    neighboring_relation: one of `NEIGHBORING_RELATIONS`.
    num_examples: rows of the larger one of two neighbouring data sets;
      "truncated_poisson" needs it.
    truncated_batch_size: the size to which a larger sample is cut; only for
      "truncated_poisson", which needs it.
    cycle_length: the number of parts that take turns; only for
      "cyclic_poisson". Rows are divided among them by their numbers, so a unit
      takes part in one of so many steps. Where a row is missing, its place
      stays empty ("zero_out").
    examples_per_user: how many rows a unit has; each is drawn independently.
    group_size: how many rows are averaged and clipped as one. The rows of a
      group are always the same, and where one is missing, its place stays
      empty. A group is drawn as a whole, and one row can reverse the group's
      gradient.
    may_grow: whether the data set has num_examples - 1 rows. It must then be
      hard to tell from one with a row more and from one with a row less.
    noise_options: options of the noise mechanism: pairs of name and value.
    clipping_options: options of the clipper: pairs of name and value.
  """

  phases: tuple[Phase, ...]
  num_steps: int
  neighboring_relation: str = "add_or_remove_one"
  num_examples: int | None = None
  truncated_batch_size: int | None = None
  cycle_length: int = 1
  examples_per_user: int = 1
  group_size: int = 1
  may_grow: bool = False
  noise_options: tuple[tuple[str, Any], ...] = ()
  clipping_options: tuple[tuple[str, Any], ...] = ()

  def __post_init__(self) -> None:
    _validation.check_fields(self, _RULES)


Proof: TypeAlias = Callable[[Numbers], Steps]


def proof(
  *, sampling: str, noise: str = "gaussian", clipper: str = "fixed"
) -> Callable[[Proof], Proof]:
  """Returns a decorator that registers a proof, by the names of settings."""
  parts = {"sampling": sampling, "noise": noise, "clipper": clipper}
  for setting, part in parts.items():
    is_single = "/" not in part
    _validation.require(is_single, setting, 'a name without "/"', part)
  module = sys._getframe(1).f_globals["__name__"]
  name = _name(sampling, noise, clipper)
  return registry.register("proof", name, module=module)


def is_proven(sampling: str, noise: str, clipper: str) -> bool:
  """Returns whether there is a proof of a mechanism; imports nothing."""
  return registry.is_known("proof", _name(sampling, noise, clipper))


def find(sampling: str, noise: str, clipper: str) -> Proof:
  """Returns the proof of a mechanism; raises ArgumentError if there is none."""
  name = _name(sampling, noise, clipper)
  if not registry.is_known("proof", name):
    known = [proven.rsplit("/", 2) for proven in registry.names("proof")]
    samplings = [x for x, *rest in known if rest == [noise, clipper]]
    if samplings:
      raise errors.ArgumentError(
        f"sampling must be one of {samplings}, which have a proof with"
        f" noise={noise!r} and clipping={clipper!r} (no proof, no run), got"
        f" {sampling!r}{_validation.suggestion(sampling, samplings)}"
      )
    choices = {*(x for _, x, _ in known)}, {*(x for *_, x in known)}
    meant = "".join(
      "" if word in words else _validation.suggestion(word, words)
      for word, words in zip((noise, clipper), choices, strict=True)
    )
    pairs = sorted({f"{x!r} and {y!r}" for _, x, y in known})
    raise errors.ArgumentError(
      "noise and clipping must have a proof together (no proof, no run), as"
      f" {' or '.join(pairs)} have, got {noise!r} and {clipper!r}{meant}"
    )
  return registry.resolve("proof", name, setting="the proof")


def proof_sha256(sampling: str, noise: str, clipper: str) -> str:
  """Returns the SHA-256 of a proof's code outside of this project, or ""."""
  name = _name(sampling, noise, clipper)
  return registry.code_sha256("proof", name, setting="the proof")


def steps(
  numbers: Numbers,
  *,
  sampling: str = "poisson",
  noise: str = "gaussian",
  clipping: str = "fixed",
) -> Steps:
  """Returns what the accountants compose, according to a mechanism's proof."""
  return find(sampling, noise, clipping)(numbers)


def by_turns(
  numbers: Numbers, event_of: Callable[[float, float], StepEvent]
) -> Steps:
  """Returns the events of a unit that has at most one step in each cycle.

  `event_of` maps a noise multiplier and a sampling probability to the event of
  a step in which the unit can take part.
  """
  stop, length = numbers.num_steps, numbers.cycle_length
  ends = [phase.start for phase in numbers.phases[1:]] + [stop]
  # The cycles that fall into each phase, in part or as a whole.
  turns = [
    (phase.start // length, num_turns(min(end, stop), length), phase)
    for phase, end in zip(numbers.phases, ends, strict=True)
    if min(end, stop) > phase.start
  ]
  bounds = sorted({x for first, last, _ in turns for x in (first, last)})
  # Which phase a row's turn falls into depends on its part. A row has at most
  # one step in a cycle, so take the worst phase of each cycle.
  return [
    (
      event_of(
        min(x.noise_multiplier for x in phases),
        max(x.sampling_probability for x in phases),
      ),
      last - first,
    )
    for first, last in itertools.pairwise(bounds)
    if (phases := [x for start, end, x in turns if start <= first < end])
  ]


def num_turns(num_steps: int, cycle_length: int = 1) -> int:
  """Returns the number of steps that a unit can take part in."""
  return -(-num_steps // cycle_length)


def _name(sampling: str, noise: str, clipper: str) -> str:
  return f"{sampling}/{noise}/{clipper}"

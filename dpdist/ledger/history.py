"""The state of a run, built from the records of its ledger one by one.

A run is a list of segments, each under one plan. In a segment there are
branches, each a line of steps under one set of keys. Steps are charged to a
branch, and so to its segment. Every fact here follows from the records alone.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

from dpdist.files import json_fields
from dpdist.privacy import plan as plan_lib

FORMAT = 3
# The notice that ends a run for good. It says what happened, and nothing of the
# data.
TOO_LONG = (
  "the sentinel found an example that was longer than its norm said, so that"
  " clipping did not bound what one example can do"
)
# The version of the rule by which a new branch's identity is made; see
# `_identity`. A branch whose record names no version is of version 1.
IDENTITY_VERSION = 2
# The fields that a record of each kind must have, and their types.
# fmt: off
FIELDS: dict[str, dict[str, type]] = {
  "writer": {},  # A process began to write.
  "lost": {},  # The machine stopped while this record was written.
  "open": {
    "config": dict, "plan": dict, "data": str, "start_step": int,
    "format": int, "secret_hash": str, "run": str,
  },
  "segment": {"config": dict, "plan": dict, "data": str, "start_step": int},
  # It may also name its "identity", the version of the rule that made it.
  "branch": {"branch": int, "start_step": int, "fingerprint": str, "base": str},
  "reserve": {"branch": int, "stop_step": int},
  # The steps from stop_step on: charged by the same writer, and never begun.
  "unstarted": {"branch": int, "stop_step": int},
  "checkpoint": {"branch": int, "step": int, "digest": str, "writer": int},
  "notice": {"text": str},  # A record may also say "unsound": true.
  "stake": {"root": str, "data": str, "stake": str},
  "epsilons": {"spent": dict, "planned": dict},
  "end": {},
}
# fmt: on
# After these records, epsilons computed from the charges before are outdated.
_CHARGING = ("open", "segment", "reserve", "unstarted", "lost")
# A record charges at most this fraction of a plan, and at least one step.
_PARTS = 100


class CheckpointRef(NamedTuple):
  """A checkpoint that is on disk."""

  step: int  # Updates made in it.
  digest: str  # SHA-256 of its manifest, hex.
  writer: int  # The number of the process that wrote it, whose folder it is in.


@dataclasses.dataclass(frozen=True)
class Branch:
  """A line of steps under one set of keys."""

  number: int  # Counts from 0.
  segment: int  # The number of its segment.
  # What its keys depend on. Of all branches of all runs and copies of runs,
  # those with the same secret and identity make the same releases.
  identity: str
  start_step: int  # Updates made before its first step.
  stop_step: int  # Its steps [start_step, stop_step) are charged.
  fingerprint: str  # Of everything that decides the bits of a step.
  # Digests of the checkpoints that it may go on from: the one that it started
  # from ("" for the initial parameters) and its own.
  bases: tuple[str, ...]
  charged: int = 0  # Steps that were charged in its segment before it.
  version: int = IDENTITY_VERSION  # Of the rule by which its identity was made.

  def release_index(self, step: int) -> int:
    """Returns a step's place among all charged steps of its segment, from 0.

    No two steps of a segment have the same place, and no step has a place that
    is not charged. So schedules and turns, which depend on the place, are what
    is accounted for.
    """
    return self.charged + step - self.start_step


@dataclasses.dataclass(frozen=True)
class Segment:
  """The steps of a run under one plan."""

  # Its steps are bound to these numbers, and counted from its start.
  plan: plan_lib.PrivacyPlan
  # The privacy settings that it came from, as the user gave them.
  config: Mapping[str, Any]
  data: str  # The content digest of the training set, hex.
  start_step: int  # Updates made before it.
  charged: int = 0  # Steps that may have been released in it.


class History:
  """What a run did, according to its records."""

  def __init__(self) -> None:
    # The bodies of all records, in order, as in all lists below.
    self.records: list[dict[str, Any]] = []
    self.segments: list[Segment] = []
    self.branches: list[Branch] = []
    self.checkpoints: list[CheckpointRef] = []
    self.writer = 0  # The number of the latest process to write, from 1.
    # Steps that were charged ahead, never begun, and are no longer charged.
    self.refunded_steps = 0
    # See `dpdist.keys.secret_hash`; "" before a run is opened.
    self.secret_hash = ""
    self.is_ended = False  # Whether nothing can be charged any more.
    # Where the run has, or was about to take, an allocation in a data set's
    # budget: dicts of "root", "data" and "stake", which is "" before it is
    # taken.
    self.places: list[dict[str, str]] = []
    self._run = ""
    # The record that opened the current segment, as it was written.
    self._opened: dict[str, Any] = {}
    # Steps of the current branch before this one stay charged: another writer
    # may have begun them, or a checkpoint has them.
    self._kept = 0

  @property
  def is_new(self) -> bool:
    """Returns whether no run was ever opened."""
    return not self.segments

  @property
  def run(self) -> str:
    """Returns the run's random name; "" for one that is to be repeatable."""
    return self._run

  @property
  def segment(self) -> Segment:
    """Returns the current segment."""
    if self.is_new:
      raise ValueError("no run was opened in this ledger")
    return self.segments[-1]

  @property
  def plan(self) -> plan_lib.PrivacyPlan:
    """Returns the plan that the run is bound to at present."""
    return self.segment.plan

  @property
  def spent(self) -> list[plan_lib.PlanUse]:
    """Returns the steps that may have been released, by plan, in order.

    The current plan's are last. Segments that ended before a step was charged
    are left out.
    """
    ended = [segment for segment in self.segments[:-1] if segment.charged]
    return [
      plan_lib.PlanUse(segment.plan, segment.charged)
      for segment in [*ended, self.segment]
    ]

  @property
  def planned(self) -> list[plan_lib.PlanUse]:
    """Returns the most that `spent` can become under the current plan."""
    return [*self.spent[:-1], plan_lib.PlanUse(self.plan, self.plan.num_steps)]

  @property
  def bounds(self) -> list[list[plan_lib.PlanUse]]:
    """Returns `planned` as it was under each plan, with what was spent before.

    Whoever may stop, shorten or change a run after a look at it spends what the
    dearest of these does, not what the path that was taken does.
    """
    found = []
    before: list[plan_lib.PlanUse] = []
    for segment in self.segments:
      whole = plan_lib.PlanUse(segment.plan, segment.plan.num_steps)
      if segment.charged:
        found.append([*before, whole])
        before.append(plan_lib.PlanUse(segment.plan, segment.charged))
    return found

  def spent_through(self, step: int) -> list[plan_lib.PlanUse]:
    """Returns `spent` as of the current branch's update `step`."""
    branch = self.branches[-1]
    ahead = branch.stop_step - max(step, branch.start_step)
    charged = self.segment.charged - ahead
    return [*self.spent[:-1], plan_lib.PlanUse(self.plan, charged)]

  @property
  def spent_steps(self) -> int:
    """Returns how many steps may have been released, over all branches."""
    return sum(segment.charged for segment in self.segments)

  @property
  def last_step(self) -> int:
    """Returns where the current branch must end to keep to the plan."""
    remaining = self.plan.num_steps - self.segment.charged
    return self.branches[-1].stop_step + remaining

  @property
  def allocations(self) -> list[dict[str, str]]:
    """Returns those of `places` whose allocation was taken."""
    return [place for place in self.places if place["stake"]]

  @property
  def epsilons(self) -> dict[str, Any] | None:
    """Returns what `record_epsilons` last recorded, if it still holds."""
    for record in reversed(self.records):
      if record["kind"] == "epsilons":
        return {k: record[k] for k in ("spent", "planned")}
      if record["kind"] in _CHARGING:
        return None
    return None

  @property
  def notices(self) -> list[str]:
    """Returns the notices that must be shown with any figure from this run."""
    found = [r["text"] for r in self.records if r["kind"] == "notice"]
    return list(dict.fromkeys(found))

  @property
  def unsound(self) -> list[str]:
    """Returns those of `notices` that make even a whole record unsound."""
    found = [r["text"] for r in self.records if r.get("unsound") is True]
    return list(dict.fromkeys(found))

  @property
  def guarantee(self) -> str:
    """Returns either "holds", or "void: " and why."""
    return "void: " + "; ".join(self.notices) if self.notices else "holds"

  def check(self, record: Mapping[str, Any]) -> None:
    """Raises ValueError for a record that makes no sense here."""
    trial = History()
    for name in vars(trial):
      # Lists of its own; the values in them never change.
      value = getattr(self, name)
      setattr(trial, name, [*value] if isinstance(value, list) else value)
    trial.apply(dict(record))

  def apply(self, record: dict[str, Any]) -> None:
    """Updates the state by one record; the only way state changes.

    Raises ValueError if the record makes no sense here; the state is as it was.
    """
    kind = record["kind"]
    if kind not in FIELDS:
      raise ValueError(f"kind {kind!r}")
    if kind in ("writer", "lost"):
      if self.branches:
        self._kept = self.branches[-1].stop_step
    elif (kind == "open") != self.is_new:
      raise ValueError(f"a record of kind {kind!r} in this place")
    elif self.is_ended:
      raise ValueError(f"a record of kind {kind!r} after the run's end")
    json_fields.check(record, FIELDS[kind])
    match record:
      case {"kind": "writer"}:
        self.writer += 1
      case {"kind": "lost"}:
        # Before a run is opened and after its end nothing can be charged; in
        # between, a lost record counts as the most that one can charge.
        if not self.is_new and not self.is_ended:
          self._charge(self._most_to_charge)
      case {"kind": "open" | "segment"}:
        self._open_segment(record)
      case {"kind": "branch"}:
        self._open_branch(record)
      case {"kind": "reserve", "stop_step": stop_step}:
        branch = self._current_branch(record)
        more = stop_step - branch.stop_step
        if not 0 < more <= self._most_to_charge:
          raise ValueError(f"a reservation of {more} steps")
        self._charge(more)
        self.branches[-1] = dataclasses.replace(branch, stop_step=stop_step)
      case {"kind": "unstarted", "stop_step": stop_step}:
        branch = self._current_branch(record)
        if not self._kept <= stop_step < branch.stop_step:
          raise ValueError(
            f"steps from {stop_step} on given back, where those before"
            f" {self._kept} may have begun and those before {branch.stop_step}"
            " are charged"
          )
        self._charge(stop_step - branch.stop_step)
        self.branches[-1] = dataclasses.replace(branch, stop_step=stop_step)
        self._kept = stop_step
        self.refunded_steps += branch.stop_step - stop_step
      case {"kind": "checkpoint", "step": step, "digest": digest}:
        branch = self._current_branch(record)
        if not branch.start_step <= step <= branch.stop_step:
          raise ValueError(f"a checkpoint of step {step}, not charged")
        bases = (*branch.bases, digest)
        self.branches[-1] = dataclasses.replace(branch, bases=bases)
        self._kept = max(self._kept, step)
        self.checkpoints.append(CheckpointRef(step, digest, record["writer"]))
      case {"kind": "stake"}:
        self.places.append({name: record[name] for name in FIELDS["stake"]})
      case {"kind": "epsilons", "spent": spent, "planned": planned}:
        values = [*spent.values(), *planned.values()]
        if not all(x is None or json_fields.is_of(float, x) for x in values):
          raise ValueError("an epsilon that is no number")
      case {"kind": "end"}:
        self.is_ended = True
    self.records.append(record)

  def _open_segment(self, record: Mapping[str, Any]) -> None:
    plan = plan_lib.PrivacyPlan.from_dict(record["plan"])
    if record["kind"] == "open":
      if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']}, expected {FORMAT}")
      self._run, self.secret_hash = record["run"], record["secret_hash"]
    elif any(
      getattr(plan, name) != getattr(self.plan, name)
      for name in plan_lib.IMMUTABLE_FIELDS
    ):
      raise ValueError("a segment with another delta or relation")
    self._opened = {name: record[name] for name in FIELDS["segment"]}
    self.segments.append(
      Segment(plan, record["config"], record["data"], record["start_step"])
    )

  def _open_branch(self, record: Mapping[str, Any]) -> None:
    if record["branch"] != len(self.branches):
      raise ValueError("a branch that does not follow")
    version = record.get("identity", 1)
    if version not in range(1, IDENTITY_VERSION + 1):
      raise ValueError(f"a branch of identity version {version!r}")
    start_step = record["start_step"]
    self.branches.append(
      Branch(
        number=len(self.branches),
        segment=len(self.segments) - 1,
        identity=self._identity(record, version),
        start_step=start_step,
        stop_step=start_step,
        fingerprint=record["fingerprint"],
        bases=(record["base"],),
        charged=self.segment.charged,
        version=version,
      )
    )
    self._kept = start_step

  def _identity(self, record: Mapping[str, Any], version: int) -> str:
    """Returns what a new branch's keys depend on: all that decides releases.

    A copy of a run directory could open another branch under the same number,
    from the same checkpoint: under another plan, by other code, or after other
    charges, on which the place of its steps in schedules and turns depends.
    """
    if not self._run:
      return str(record["branch"])
    facts: Any = {
      "run": self._run,
      "segment": [len(self.segments) - 1, self._opened],
      "charged": self.segment.charged,
      "branch": {name: record[name] for name in FIELDS["branch"]},
    }
    if version == 1:  # Some runs have such branches.
      names = ("branch", "start_step", "fingerprint", "base")
      facts = [self._run, *(record[name] for name in names)]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  @property
  def _most_to_charge(self) -> int:
    """Returns how many steps the next record may charge."""
    remaining = self.plan.num_steps - self.segment.charged
    return min(most_steps(self.plan), remaining)

  def _charge(self, num_steps: int) -> None:
    charged = self.segment.charged + num_steps
    self.segments[-1] = dataclasses.replace(self.segment, charged=charged)

  def _current_branch(self, record: Mapping[str, Any]) -> Branch:
    number = record["branch"]
    if not self.branches or number != self.branches[-1].number:
      raise ValueError(f"branch {number!r} is not the current one")
    if self.branches[-1].segment != len(self.segments) - 1:
      raise ValueError("a segment in which no branch has begun")
    return self.branches[-1]


def most_steps(plan: plan_lib.PrivacyPlan) -> int:
  """Returns how many steps one record may charge."""
  return -(-plan.num_steps // _PARTS)

"""Runs, kills, copies, lost checkpoints, other code or settings, in any order.

A model of a run whose "parameters" are a digest of all that went into them.
Whatever happens, no key meets two inputs at one step, and every ledger covers
what was released under it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import pathlib
import shutil
import tempfile

import hypothesis
from hypothesis import stateful
from hypothesis import strategies as st

from dpdist import errors
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib

_NUM_STEPS = 300  # So that a record charges up to three.
_CONFIG = plan_lib.PrivacyConfig(
  num_examples=1000,
  expected_batch_size=10,
  num_steps=_NUM_STEPS,
  l2_clip_norm=1.0,
  noise_multiplier=1.0,
  target_delta=1e-5,
)
# What may be changed on the way.
_CONFIGS = [
  _CONFIG,
  dataclasses.replace(_CONFIG, l2_clip_norm=2.0),
  dataclasses.replace(_CONFIG, noise_multiplier=2.0),
]


def _digest(*parts):
  return hashlib.sha256(repr(parts).encode()).hexdigest()


class _Process:
  """A training loop that may be dead, without having noticed."""

  def __init__(self, run, code, config):
    self.run = run
    # Training may differ by either.
    self.code = _digest(code, config)
    self.ledger = ledger_lib.Ledger(run.path)
    self.ledger.acquire()
    facts = {"config": dataclasses.asdict(config), "data": "d"}
    if self.ledger.is_new:
      self.ledger.open(
        **facts,
        plan=plan_lib.make_plan(config),
        secret_hash="s",
        run=run.name,
      )
    self.step, self.state, digest, head = 0, "initial", "", ""
    for saved in reversed(self.ledger.checkpoints):
      if saved in run.checkpoints:
        self.state, head = run.checkpoints[saved]
        self.step, digest, _ = saved
        break
    if self.ledger.changes(**facts, secret_hash="s"):
      plan = composition.plan_after(
        config,
        before=self.ledger.segment.config,
        spent=self.ledger.spent,
        start_step=self.step,
      )
      self.ledger.open_segment(**facts, plan=plan, start_step=self.step)
    self.branch = self.ledger.resume(
      step=self.step, digest=digest, ledger_head=head, fingerprint=self.code
    )
    self.numbers = _numbers(self.ledger.plan)


def _numbers(plan):
  """What a step's price depends on."""
  return plan.noise_multiplier, plan.sampling_probability


class _Run:
  def __init__(self, path, name):
    self.path, self.name = path, name
    self.checkpoints = {}  # Saved -> (state, ledger head)
    self.released = {}  # (identity, step) -> numbers


class Machine(stateful.RuleBasedStateMachine):
  @stateful.initialize()
  def start(self):
    self.root = pathlib.Path(tempfile.mkdtemp())
    self.patience = records.PATIENCE_SECONDS
    records.PATIENCE_SECONDS = 0.0
    self.runs = [_Run(self.root / str(i), f"run {i}") for i in range(2)]
    self.processes = []
    self.inputs = {}  # (identity, step) -> digest of what went into it

  def teardown(self):
    for process in self.processes:
      process.ledger.close()
    records.PATIENCE_SECONDS = self.patience
    shutil.rmtree(self.root)

  @stateful.rule(
    number=st.integers(0, 11),
    code=st.sampled_from(["v1", "v2"]),
    config=st.sampled_from(_CONFIGS),
    steps=st.integers(0, 7),
    ahead=st.integers(0, 5),
  )
  def launch(self, number, code, config, steps, ahead):
    """Also where one is running, or paused: it is taken for dead."""
    run = self.runs[number % len(self.runs)]
    self.processes.append(_Process(run, code, config))
    self._train(self.processes[-1], steps, ahead)

  @stateful.precondition(lambda self: self.processes)
  @stateful.rule(
    data=st.data(), steps=st.integers(1, 7), ahead=st.integers(0, 5)
  )
  def train(self, data, steps, ahead):
    self._train(data.draw(st.sampled_from(self.processes)), steps, ahead)

  def _train(self, process, steps, ahead):
    ledger, run = process.ledger, process.run
    stop = min(process.step + steps, ledger.last_step)
    try:
      ledger.reserve_through(min(stop + ahead, ledger.last_step))
    except errors.LedgerError:
      self._stop(process)  # It was shut out.
      return
    for step in range(process.step, stop):
      key = (process.branch.identity, step)
      place = process.branch.release_index(step)
      given = _digest(process.state, process.code, place)
      assert self.inputs.setdefault(key, given) == given
      assert run.released.setdefault(key, process.numbers) == process.numbers
      process.state = _digest(given, key)
    process.step = max(stop, process.step)

  @stateful.precondition(lambda self: self.processes)
  @stateful.rule(data=st.data())
  def save(self, data):
    process = data.draw(st.sampled_from(self.processes))
    ledger = process.ledger
    digest, head = _digest(process.state, process.step), ledger.head
    saved = history.CheckpointRef(process.step, digest, ledger.writer)
    try:
      ledger.record_checkpoint(process.step, digest)
    except errors.LedgerError:
      self._stop(process)
      return
    process.run.checkpoints[saved] = (process.state, head)

  @stateful.precondition(lambda self: self.processes)
  @stateful.rule(data=st.data())
  def end(self, data):
    self._stop(data.draw(st.sampled_from(self.processes)))

  @stateful.precondition(lambda self: self.processes)
  @stateful.rule(data=st.data())
  def end_in_an_orderly_way(self, data):
    """It gives back what it charged ahead and never began."""
    process = data.draw(st.sampled_from(self.processes))
    with contextlib.suppress(errors.LedgerError):  # It was shut out.
      process.ledger.refund(process.step)
    self._stop(process)

  def _stop(self, process):
    process.ledger.close()
    self.processes.remove(process)

  @stateful.rule(data=st.data())
  def lose_a_checkpoint(self, data):
    run = data.draw(st.sampled_from(self.runs))
    if run.checkpoints:
      del run.checkpoints[data.draw(st.sampled_from(sorted(run.checkpoints)))]

  @stateful.rule(data=st.data())
  def tear(self, data):
    """The machine stops while a record is being written."""
    run = data.draw(st.sampled_from(self.runs))
    if run.path.exists():
      written = ledger_lib.Ledger(run.path).records
      if written[-1]["kind"] != "lost":
        (run.path / f"{len(written):012d}.json").write_bytes(b'{"torn')

  @stateful.precondition(lambda self: len(self.runs) < 4)
  @stateful.rule(data=st.data())
  def copy(self, data):
    run = data.draw(st.sampled_from(self.runs))
    if run.path.exists():
      other = _Run(self.root / str(len(self.runs)), run.name)
      shutil.copytree(run.path, other.path)
      other.checkpoints = dict(run.checkpoints)
      other.released = dict(run.released)
      self.runs.append(other)

  @stateful.invariant()
  def every_release_is_recorded(self):
    for run in getattr(self, "runs", []):
      spent = ledger_lib.Ledger(run.path)
      if not spent.is_new:
        assert len(run.released) <= spent.spent_steps
        charged = collections.Counter()
        for plan, num_steps in spent.spent:
          assert num_steps <= plan.num_steps
          charged[_numbers(plan)] += num_steps
        assert collections.Counter(run.released.values()) <= charged


Machine.TestCase.settings = hypothesis.settings(
  max_examples=60,
  stateful_step_count=20,
  deadline=None,
  derandomize=True,
)
TestLedger = Machine.TestCase

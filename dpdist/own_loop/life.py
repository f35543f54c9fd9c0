"""The life of a run under a loop of one's own: opened, gone on with, branched.

A `Life` knows under which keys each release is made. A release that another
process made before it was killed is a replay, under the keys that it had then.
If what goes into it is not the same, the run goes on with a new branch: its
keys are new, and its steps are charged on top.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import hashlib
import json
import pathlib
import secrets

from jax.sharding import Mesh
import ml_collections

from dpdist import config as config_lib
from dpdist import errors
from dpdist.distributed import collectives
from dpdist.keys import keys
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.mechanism import outside_code
from dpdist.own_loop import commitments as commitments_lib
from dpdist.workdir import checkpoints as checkpoints_lib
from dpdist.workdir import fingerprint
from dpdist.workdir import resume
from dpdist.workdir import session as session_lib


class Life:
  """A run in its directory; made and used by all processes together.

  Attributes:
    plan: the numbers that the run is bound to.
    found: the checkpoint to go on from.
    ledger: written by this process; None in those that are not primary.
    notices: to be shown with any figure of this run.
    session: charges and saves, on the present branch; None before `resume`.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    mesh: Mesh,
    digest: str,
    earlier: Callable[[], Sequence[str]],
    stack: contextlib.ExitStack,
    *,
    ahead: int,
  ):
    """Opens the directory, and makes the primary process its writer.

    `digest` names the training data; see
    `dpdist.workdir.resume.recorded_digest` for earlier. `ahead` steps are
    charged at once. What must be closed is put on the stack.
    """
    self._config, self._workdir = config, workdir
    self.session: session_lib.Session | None = None
    self.ledger: ledger_lib.Ledger | None = None

    def open_ledger() -> None:
      self.ledger = stack.enter_context(resume.open_ledger(config, workdir))

    collectives.run_on_primary(open_ledger)
    fingerprint.check_code()
    self.environment = fingerprint.environment(mesh)
    code = outside_code.sha256(config_lib.privacy_config(config))
    alike = ("code_sha256", "packages", "jax_config")
    collectives.assert_equal(
      settings=config.to_dict(),
      training_data=digest,
      code_outside=code,
      **{name: self.environment[name] for name in alike},
    )
    self._data = resume.recorded_digest(self.ledger, digest, earlier)
    self.plan, self._changes, self.found = resume.resolve_plan(
      config, workdir, self.ledger, self._data
    )
    self._settings = config_lib.privacy_dict(config)
    begun = resume.begin(
      config,
      workdir,
      self.ledger,
      plan=self.plan,
      settings=self._settings,
      data=self._data,
      own_digest=digest,
      earlier=earlier,
      is_changed=bool(self._changes),
    )
    self._begun, self.notices = begun, [*begun.notices, *self.found.rejected]
    self.checkpoints = stack.enter_context(
      checkpoints_lib.Checkpoints(
        workdir / "checkpoints",
        writer=begun.writer,
        max_to_keep=config.max_checkpoints,
      )
    )
    # Of all that decides a release besides its inputs.
    self.fingerprint = fingerprint.fingerprint(
      config.to_dict(),
      self.plan.fingerprint(),
      self._data,
      [*map(json.loads, collectives.gather(json.dumps(self.environment)))],
      {"mechanism_code_sha256": code} if code else {},
    )
    # Steps are kept or lost together with a checkpoint; see
    # `dpdist.training.loop`.
    self._ahead = max(ahead, history.most_steps(self.plan))
    self._charged = 0
    # Of its own: what the given stack holds may move on before `resume`.
    self._stack = stack.enter_context(contextlib.ExitStack())
    self._commitments: commitments_lib.Commitments | None = None
    # Of this process, in the keys of all that it is the first to make. Runs
    # with an insecure seed are to be repeatable.
    name = "" if config.insecure_seed is not None else secrets.token_hex(16)
    self._start = str(collectives.run_on_primary(lambda: name))
    self._starts: dict[int, str] = {}

  def resume(self, step: int, ledger_head: str) -> None:
    """Goes on from the checkpoint that was found, of so many charged steps.

    The ledger's head is the one that it was saved under.
    """
    saved, rejected = self.found

    def look() -> tuple[session_lib.Position, dict[str, str]]:
      ledger = self._primary_ledger
      if self._changes:
        ledger.open_segment(
          config=self._settings,
          plan=self.plan,
          data=self._data,
          start_step=step,
        )
      is_new = not ledger.branches
      on_branch = functools.partial(
        ledger.resume,
        step=step,
        digest=saved.digest if saved else "",
        ledger_head=ledger_head,
      )
      branch = on_branch(fingerprint=self.fingerprint)
      try:
        opened = commitments_lib.Commitments(
          self._workdir,
          self._begun.secret,
          ledger,
          is_new=is_new or branch.stop_step == branch.start_step,
        )
      except errors.LedgerError as problem:
        # What was charged may have been released under any keys.
        self.notices.append(f"{problem}: the steps after it are charged again")
        branch = on_branch(fingerprint=secrets.token_hex(32))
        commitments_lib.set_aside(self._workdir)
        opened = commitments_lib.Commitments(
          self._workdir, self._begun.secret, ledger, is_new=True
        )
      self._commitments = self._stack.enter_context(opened)
      if rejected and ledger.last_step == 0:
        raise errors.LedgerError(
          "no checkpoint can be restored, and the plan is spent; "
          + "; ".join(rejected)
        )
      starts = opened.find(branch.identity)
      return (
        session_lib.Position.of(ledger),
        {str(n): start for n, start in starts.items() if n >= step},
      )

    position, starts = collectives.run_on_primary(look)
    self._starts = {int(number): start for number, start in starts.items()}
    self._enter(session_lib.Position(*position), step)

  def branch_off(self, step: int) -> None:
    """Opens a branch at a step that is no replay; what was ahead is given back.

    It does not follow from the checkpoint, so that a process that goes on from
    there opens another one.
    """
    self.present.__exit__(None, None, None)

    def open_branch() -> session_lib.Position:
      ledger = self._primary_ledger
      ledger.resume(
        step=step,
        digest=secrets.token_hex(32),
        ledger_head="",
        fingerprint=secrets.token_hex(32),
      )
      return session_lib.Position.of(ledger)

    position = session_lib.Position(*collectives.run_on_primary(open_branch))
    self._starts = {}
    self._enter(position, step)

  def charge(self, stop: int) -> None:
    """Charges the steps before `stop`, durably, and some ahead."""
    if stop > self._charged:
      last = self.present.position.last_step
      end = stop - stop % self._ahead + self._ahead
      charged = max(stop, min(last, end))
      self.present.charge(charged)
      self._charged = charged

  def _enter(self, position: session_lib.Position, step: int) -> None:
    self._charged = step
    self.session = session_lib.Session(
      self.ledger,
      self.checkpoints,
      self._begun.secret,
      position,
      start_step=step,
      budget=self._begun.budget,
    )

  @property
  def present(self) -> session_lib.Session:
    """Returns the session, once there is one."""
    assert self.session is not None
    return self.session

  @property
  def _primary_ledger(self) -> ledger_lib.Ledger:
    """Returns the ledger; may be asked for in the primary process alone."""
    assert self.ledger is not None
    return self.ledger

  def streams(self, step: int) -> mechanism.Streams:
    """Returns all randomness of a charged step."""
    branch = self.present.position.branch
    start = self._starts.get(step, self._start)
    if start:
      branch = f"{branch}/{start}"
    return mechanism.Streams(self._begun.secret, branch)

  @property
  def digest_key(self) -> bytes:
    """Returns the key of digests of what goes into a release."""
    return keys.derive(self._begun.secret, "release_inputs")

  def commit(self, step: int, inputs: str) -> bool:
    """Returns whether a charged step may be made of inputs, by their digest.

    It must precede any use of the step's noise. False: a release was made of
    other inputs, and its keys must not be used. The inputs' digests of all
    processes count.
    """
    together = "".join(collectives.gather(inputs))
    line = commitments_lib.Line(
      self.present.position.branch,
      step,
      self._starts.get(step, self._start),
      hashlib.sha256(together.encode()).hexdigest(),
    )

    def decide() -> bool:
      assert self._commitments is not None
      return self._commitments.commit(line)

    return bool(collectives.run_on_primary(decide))

"""Small real runs of `launch.train` that can be killed, and what must hold.

A run is the real command in a process of its own. The process is forked from
one that has imported the libraries, and compiles nothing that another compiled,
so that it starts in a second; or is begun from nothing, with method "spawn".
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import runpy
import signal
import sys
import time
from typing import Any, NamedTuple

from dpdist.ledger import ledger as ledger_lib
from dpdist.reporting import metrics
from dpdist.workdir import verify

NUM_STEPS = 48
_ROOT = pathlib.Path(__file__).parents[2]
_SEED = "--config.insecure_seed=7"
ARGS = (
  f"--config={_ROOT}/configs/digits.py",
  _SEED,
  "--config.checkpoint_every=4",
  "--config.eval_every=1",
  "--config.model.width=64",
  "--config.privacy.accountant=rdp",
  "--config.privacy.expected_batch_size=64",
  f"--config.privacy.num_steps={NUM_STEPS}",
)
# All that the command imports, but not the command.
_IMPORTED = (
  *(
    "dpdist.workdir.checkpoints",
    "dpdist.training.job",
    "dpdist.reporting.report",
    "dpdist.reporting.console",
  ),
  *(
    "dpdist.training.summary",
    "launch.cli.flag_parsing",
    "ml_collections.config_flags",
  ),
  *("matplotlib.figure", "scipy.stats", "sklearn.datasets"),
)

# What shows, in a run's directory, how far a process has come, and the most
# changes of it to wait for.
_SIGNS = (
  ("*", 4),
  ("ledger/*.json", 12),
  ("ledger/*", 12),  # Temporary files and locks too.
  ("metrics.jsonl", 12),
  ("checkpoints/writer_*/*", 6),
  ("checkpoints/writer_*/**/*", 30),
  ("checkpoints/writer_*/*/dpdist_manifest.json*", 4),
  ("tensorboard/*", 1),
  ("re*", 2),  # The result and the report.
)


class Run:
  """A process that trains.

  Attributes:
    workdir: its run directory.
    process: it.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *args: str,
    change: Callable[[], None] | None = None,
    method: str = "forkserver",
    aside: pathlib.Path | None = None,
    is_seeded: bool = True,
  ):
    """Starts it.

    Args:
      workdir: the run directory.
      *args: further flags.
      change: is called in the process before the command is opened.
      method: of `multiprocessing`: "forkserver" or "spawn".
      aside: where its screen and compiled programs go; None: beside workdir.
      is_seeded: whether all that is random is fixed; else it has a secret.
    """
    given = [arg for arg in ARGS if is_seeded or arg != _SEED]
    self.workdir = workdir
    aside = aside or workdir.parent
    self._screen = aside / f"screen-{time.monotonic_ns()}"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
      context.set_forkserver_preload(list(_IMPORTED))
    self.process = context.Process(
      target=_train,
      args=(
        [*given, *args, f"--workdir={workdir}"],
        aside / "compiled",
        self._screen,
        change,
      ),
    )
    self.process.start()

  @property
  def screen(self) -> str:
    """What it has printed so far."""
    return self._screen.read_text() if self._screen.exists() else ""

  def wait(self) -> int:
    """Returns its exit code when it has ended."""
    self.process.join(timeout=300)
    code = self.process.exitcode
    if code is None:
      self.process.kill()
      raise TimeoutError(self.screen)
    return code

  def kill(self) -> None:
    """Kills it, and returns when it is gone."""
    self.process.kill()
    self.process.join()


def _train(
  args: list[str],
  compiled: pathlib.Path,
  screen: pathlib.Path,
  change: Callable[[], None] | None,
) -> None:
  descriptor = os.open(screen, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
  os.dup2(descriptor, 1)
  os.dup2(descriptor, 2)
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  # The one of all tests may be open already.
  compilation_cache.reset_cache()
  jax.config.update("jax_compilation_cache_dir", str(compiled))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  if change is not None:
    change()
  sys.argv = ["launch.train", *args]
  runpy.run_module("launch.train", run_name="__main__", alter_sys=True)


def before(
  where: str, call: int, do: Callable[[], object]
) -> Callable[[], None]:
  """A change to a process: that it does something before a call.

  Args:
    where: the function, as "module:Class:name".
    call: before the how-manieth call of it, from 1.
    do: what.
  """
  return functools.partial(_before, where, call, do)


def _before(where: str, call: int, do: Callable[[], object]) -> None:
  module, *path, name = where.split(":")
  owner = functools.reduce(getattr, path, importlib.import_module(module))
  original, calls = getattr(owner, name), itertools.count(1)

  def replaced(*args: Any, **kwargs: Any) -> Any:
    if next(calls) == call:
      do()
    return original(*args, **kwargs)

  setattr(owner, name, replaced)


def send(number: signal.Signals) -> Callable[[], None]:
  """Something to do: to send oneself a signal."""
  return functools.partial(signal.raise_signal, number)


class Outcome(NamedTuple):
  """What must not depend on what happened to a run."""

  epsilon: float
  num_steps: int
  steps_charged: int
  params_sha256: str


def outcome(workdir: pathlib.Path) -> Outcome:
  """Of a finished run."""
  result = json.loads((workdir / "result.json").read_text())
  return Outcome(*(result[name] for name in Outcome._fields))


class Kill(NamedTuple):
  """Where a run was killed.

  Attributes:
    workdir: its directory.
    released: the last step that was released by then.
    sign: a pattern, in the directory, for what was looked at.
    changes: how many changes of it were waited for.
    delay: and how many seconds after that.
  """

  workdir: pathlib.Path
  released: int
  sign: str
  changes: int
  delay: float


def last_released(workdir: pathlib.Path) -> int:
  """The last step of which anything can be seen in a run's directory."""
  steps = [
    int(path.name)
    for path in workdir.glob("checkpoints/writer_*/*")
    if path.name.isdecimal()
  ]
  return max([0, *steps, *(row["step"] for row in metrics.read(workdir))])


def check(workdir: pathlib.Path, released: int = 0) -> int:
  """Holds a run's directory, whatever happened to it, against the invariants.

  Args:
    workdir: of a run that no process writes.
    released: the last step that was seen there before.

  Returns:
    The last step that was released so far.
  """
  released = max(released, last_released(workdir))
  ledger = ledger_lib.Ledger(workdir / "ledger")
  assert released <= ledger.spent_steps <= NUM_STEPS
  assert len(ledger.branches) <= 1
  if not ledger.is_new:
    for finding in verify.verify(workdir, ledger):
      assert not finding.problem, finding
  return released


def kill_often(
  directory: pathlib.Path,
  expected: Outcome,
  *,
  kills: int,
  seed: int,
  **start: Any,
) -> Iterator[Kill]:
  """Kills runs at random moments and starts them again, until each is done.

  Moments go by what a process has done since it was started, and not by the
  clock alone, so that each part of a run has its share on any machine.

  Args:
    directory: for the runs' directories.
    expected: what every run must come to.
    kills: how many.
    seed: of the moments.
    **start: for `Run`.

  Yields:
    Each kill, when what it left was found to be right.
  """
  rng = random.Random(seed)
  signs: list[tuple[str, int]] = []
  number, released = 0, 0
  workdir = directory / "0"
  while kills:
    signs = signs or rng.sample(_SIGNS, len(_SIGNS))
    sign, most = signs.pop()
    changes = rng.randint(1, most)
    delay = rng.choice([0.0, 0.003 * rng.random(), 0.3 * rng.random()])
    run = Run(workdir, **start)
    _wait_for(run, sign, changes, delay)
    run.kill()
    released = check(workdir, released)
    if run.process.exitcode == -signal.SIGKILL:
      kills -= 1
      yield Kill(workdir, released, sign, changes, delay)
    else:
      _end(run, expected)
      number, released = number + 1, 0
      workdir = directory / str(number)
  _end(Run(workdir, **start), expected)


def _end(run: Run, expected: Outcome) -> None:
  assert run.wait() == 0, run.screen
  check(run.workdir)
  assert outcome(run.workdir) == expected


def _wait_for(run: Run, sign: str, changes: int, delay: float) -> None:
  """Waits until what a pattern finds has changed, or the process has ended."""
  before = _look(run.workdir, sign)
  while changes and run.process.is_alive():
    now = _look(run.workdir, sign)
    changes -= now != before
    before = now
    time.sleep(0.001)
  time.sleep(delay)


def _look(workdir: pathlib.Path, sign: str) -> list[tuple[str, int]]:
  found = []
  with contextlib.suppress(FileNotFoundError):  # It was deleted meanwhile.
    for path in workdir.glob(sign):
      found.append((str(path), path.stat().st_size))
  return sorted(found)

r"""Trains on a Ray cluster, one process a node; restarts all if needed.

  python -m launch.engines.ray_driver --nodes=2 -- \
    --config=digits --workdir=/shared/digits

is what `launch.submit --to=ray` submits. Arguments after `--` go to each
`dpdist train`. All processes are started again when they were stopped
and saved, and when one failed or a node was lost, until --max_restarts such
failures. SIGTERM, as by `ray job stop`, is passed on once: all save the same
step, and nothing starts again.

Exit codes: those of launch.train.
"""

from collections.abc import Sequence
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import Any

from absl import flags

from dpdist import errors

from ..cli import exit_codes
from ..cli import flag_parsing
from ..cli import words

_NODES = flags.DEFINE_integer("nodes", 1, "Processes, each on a node.", 1)
_CPUS = flags.DEFINE_integer("cpus", 1, "Processors of each.", 1)
_GPUS = flags.DEFINE_integer("gpus", 0, "GPUs of each.", 0)
_MAX_RESTARTS = flags.DEFINE_integer(
  "max_restarts", 20, "After failures; a stop that saved is not counted.", 0
)
_WAIT = flags.DEFINE_float(
  "wait_seconds", 600.0, "How long to wait for that many nodes.", 0.0
)
_GRACE = flags.DEFINE_float(
  "grace_seconds",
  30.0,
  "When one has failed: how long the others have to stop by themselves.",
  0.0,
)
_LOOK_SECONDS = 0.5
_LOST = -1
_TRAIN = words.module("train")


class _Process:
  """An actor: one process of the job, on a node of its own."""

  def __init__(self) -> None:
    self._process: subprocess.Popen[bytes] | None = None
    self._stopped = False

  def address(self) -> str:
    """Returns a host and free port of this node, for process 0."""
    import ray

    with socket.socket() as server:
      server.bind(("", 0))
      port = server.getsockname()[1]
    return f"{ray.util.get_node_ip_address()}:{port}"

  def run(self, arguments: list[str], variables: dict[str, str]) -> int:
    """Trains, and returns the exit code. Ray shows what it prints."""
    # Ray ends what an actor started together with the actor.
    self._process = subprocess.Popen(
      [sys.executable, "-u", "-m", _TRAIN, *arguments],
      env={**os.environ, **variables},
      stdin=subprocess.DEVNULL,
    )
    if self._stopped:
      self._process.terminate()
    return self._process.wait()

  def stop(self) -> None:
    """Asks the process to save and stop."""
    self._stopped = True
    if self._process is not None:
      self._process.terminate()


def main(argv: Sequence[str]) -> int:
  """Returns an exit code."""
  try:
    import ray
  except ModuleNotFoundError:
    return flag_parsing.usage_error(
      "ray is missing: pip install 'ray[default]'",
      errors.Hint(text="pip install 'ray[default]'"),
    )
  stop = _Stop()
  try:
    ray.init(address="auto", logging_level=logging.WARNING)
  except ConnectionError:
    return flag_parsing.usage_error(
      "no Ray cluster runs here: `ray start --head`, or set RAY_ADDRESS"
    )
  # Ray has installed its own handler by now.
  signal.signal(signal.SIGTERM, stop.receive)
  signal.signal(signal.SIGINT, stop.receive)
  failures = 0
  while True:
    codes = _attempt(list(argv), stop)
    code = _worst(codes)
    if code in (exit_codes.DONE, exit_codes.USAGE) or stop.asked:
      return code
    failures += code != exit_codes.PREEMPTED
    if failures > _MAX_RESTARTS.value:
      print(f"error: failed {failures} times", file=sys.stderr)
      return code
    print(f"exit codes {codes}: all start again", file=sys.stderr, flush=True)


class _Stop:
  """Records whether SIGTERM or SIGINT came."""

  asked = False

  def receive(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self.asked = True


def _attempt(arguments: list[str], stop: _Stop) -> list[int]:
  """Starts all processes once; returns exit codes, -1 of one that was lost."""
  import ray
  from ray.util import scheduling_strategies

  bundle: dict[str, float] = {"CPU": _CPUS.value}
  if _GPUS.value:
    bundle["GPU"] = _GPUS.value
  group = ray.util.placement_group([bundle] * _NODES.value, "STRICT_SPREAD")
  try:
    deadline = time.monotonic() + _WAIT.value
    while not group.wait(1):
      if stop.asked or time.monotonic() > deadline:
        print(
          f"error: no {_NODES.value} nodes with {bundle} each came",
          file=sys.stderr,
        )
        return [_LOST]
    actor = ray.remote(_Process)
    actors = [
      actor.options(
        num_cpus=_CPUS.value,
        num_gpus=_GPUS.value,
        # `stop` is called while `run` goes on.
        max_concurrency=2,
        scheduling_strategy=(
          scheduling_strategies.PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=rank
          )
        ),
      ).remote()
      for rank in range(_NODES.value)
    ]
    return _run(actors, arguments, stop)
  finally:
    # Also removes the actors.
    ray.util.remove_placement_group(group)


def _run(actors: list[Any], arguments: list[str], stop: _Stop) -> list[int]:
  import ray

  try:
    address = ray.get(actors[0].address.remote())
  except ray.exceptions.RayError:
    return [_LOST]
  tasks = [
    actor.run.remote(
      arguments,
      {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(len(actors)),
        "JAX_PROCESS_ID": str(rank),
      },
    )
    for rank, actor in enumerate(actors)
  ]
  codes: dict[int, int] = {}
  waiting = {task: rank for rank, task in enumerate(tasks)}
  passed_on = False
  deadline: float | None = None
  while waiting:
    ended, _ = ray.wait(list(waiting), timeout=_LOOK_SECONDS)
    for task in ended:
      codes[waiting.pop(task)] = _code(task)
    if any(codes.values()) and deadline is None:
      deadline = time.monotonic() + _GRACE.value
    if stop.asked and not passed_on:
      passed_on = True
      for actor in actors:
        actor.stop.remote()
    if deadline is not None and time.monotonic() > deadline:
      for rank in waiting.values():
        ray.kill(actors[rank])
  return [codes[rank] for rank in range(len(actors))]


def _code(task: Any) -> int:
  import ray

  try:
    code: int = ray.get(task)
  except ray.exceptions.RayError:
    return _LOST
  return code


def _worst(codes: Sequence[int]) -> int:
  """Returns the exit code of all; a refusal counts before other failures."""
  if exit_codes.USAGE in codes:
    return exit_codes.USAGE
  failed = [
    code
    for code in codes
    if code not in (exit_codes.DONE, exit_codes.PREEMPTED)
  ]
  if failed:
    return failed[0] if failed[0] > 0 else 1
  return max(codes)


if __name__ == "__main__":
  flag_parsing.run(main, passes_on=True)

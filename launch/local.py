r"""Trains with several processes on this machine.

  python -m launch.local --num_processes=4 --devices_per_process=2 -- \
    --config=configs/digits.py --workdir=/tmp/digits

Arguments after `--` go to each `python -m launch.train`. The processes connect
through a free port of this machine. Each line that they print begins with the
rank of the process. Ctrl-C or SIGTERM makes all save the same step and stop;
one more, a second or more later, kills them. When one fails, all stop.

Exit codes: 0 done; 75 stopped by a signal, saved, run it again; 2 wrong usage;
else that of the first process that failed, or 128 plus the signal's number if a
signal ended it.
"""

from collections.abc import Mapping, Sequence
import os
import signal
import socket
import sys

from absl import flags

from .cli import exit_codes
from .cli import flag_parsing
from .engines import local_processes

_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", 2, "How many processes.", lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
  "devices_per_process", 1, "CPU devices that each has.", lower_bound=1
)
_GRACE = flags.DEFINE_float(
  "grace_seconds",
  30.0,
  "When one has failed: how long the others have to stop by themselves.",
  lower_bound=0.0,
)

# Flags that this command sets for each process.
_GIVEN_HERE = ("coordinator_address", "num_processes", "process_id")


def main(argv: Sequence[str]) -> int:
  """Returns an exit code."""
  arguments = list(argv)
  try:
    _check(arguments, os.environ)
  except ValueError as error:
    return flag_parsing.usage_error(error)
  processes = local_processes.Pod(
    [sys.executable, "-m", "launch.train", *arguments],
    _environments(os.environ, _NUM_PROCESSES.value, _DEVICES.value),
    _GRACE.value,
  )
  try:
    processes.run()
  except OSError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  code, message = _summary(processes.exits, processes.signals)
  if message:
    print(f"launch.local: {message}", file=sys.stderr)
  return code


def _check(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
  for argument in arguments:
    name = argument.lstrip("-").partition("=")[0]
    if argument.startswith("-") and name in _GIVEN_HERE:
      raise ValueError(
        f"--{name} must not come after --: launch.local tells each process its"
        f" own, got {argument!r}"
      )
  platforms = environment.get("JAX_PLATFORMS") or "cpu"
  if platforms.split(",")[0] != "cpu":
    raise ValueError(
      "JAX_PLATFORMS must be cpu or unset for launch.local, which divides no"
      f" accelerators among processes, got {platforms!r}"
    )


def _environments(
  base: Mapping[str, str], num_processes: int, devices: int
) -> list[dict[str, str]]:
  """Returns the environment variables of each process, by rank."""
  flag = f"--xla_force_host_platform_device_count={devices}"
  common = {
    **base,
    "JAX_PLATFORMS": "cpu",
    # The last flag of a kind counts.
    "XLA_FLAGS": f"{base.get('XLA_FLAGS', '')} {flag}".strip(),
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}",
    "JAX_NUM_PROCESSES": str(num_processes),
    # Lines appear when they are printed.
    "PYTHONUNBUFFERED": "1",
  }
  return [
    {**common, "JAX_PROCESS_ID": str(rank)} for rank in range(num_processes)
  ]


def _free_port() -> int:
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    port: int = server.getsockname()[1]
    return port


def _summary(
  exits: Sequence[local_processes.Exit], signals: Sequence[int]
) -> tuple[int, str]:
  """Returns the exit code of all, and a line on it; "" if all is well."""
  if len(signals) > 1:
    return 128 + signals[0], "killed by a second signal, before all had saved"
  calm = (exit_codes.DONE, exit_codes.PREEMPTED)
  # A process that was made to end here is not why the others failed.
  failed = [e for e in exits if e.code not in calm and not e.forced]
  failed += [e for e in exits if e.code not in calm and e.forced]
  if failed:
    first = failed[0]
    code = first.code if first.code > 0 else 128 - first.code
    return code, (
      f"process {first.rank} {_meaning(first, bool(signals))}; exit code {code}"
    )
  if any(e.code == exit_codes.PREEMPTED for e in exits):
    return exit_codes.PREEMPTED, "stopped and saved; run the same command again"
  return exit_codes.DONE, ""


def _meaning(end: local_processes.Exit, asked: bool) -> str:
  """Says what an exit code means, for people."""
  if end.forced:
    return "did not stop by itself, and was killed"
  if end.code == exit_codes.USAGE:
    return "refused its arguments or settings (its lines above say why)"
  if end.code > 0:
    return "failed first (its lines above say why)"
  name = signal.Signals(-end.code).name
  if asked and end.code == -signal.SIGTERM:
    return "ended before it could save; run the same command again"
  if end.code == -signal.SIGKILL:
    return (
      f"was the first to fail, by {name}: memory ran out, or someone sent it"
    )
  return f"was the first to fail, by {name}"


if __name__ == "__main__":
  flag_parsing.run(main, passes_on=True)

"""Real jobs of several processes on this machine, which meet over gloo."""

from collections.abc import Callable, Mapping, Sequence
import functools
import os
import pathlib
import socket

from tests.support import training

# Sums whose bits do not depend on how many processes there are.
_ARGS = (
  "--config.clipping.exact_sum=True",
  "--config.clipping.exact_group_size=16",
  "--config.eval_every=6",
)


def address() -> str:
  """Where process 0 of a job may listen."""
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{server.getsockname()[1]}"


def start(
  workdir: pathlib.Path,
  count: int,
  *args: str,
  aside: pathlib.Path,
  changes: Mapping[int, Sequence[Callable[[], None]]] | None = None,
) -> list[training.Run]:
  """Starts a job with a device a process.

  Args:
    workdir: the run directory.
    count: of processes.
    *args: further flags.
    aside: where screens and compiled programs go, for later jobs too.
    changes: by the number of the process, what is called in it before the
      command is opened.
  """
  where = address()
  runs = []
  for number in range(count):
    own = aside / f"process{number}"
    own.mkdir(exist_ok=True)
    variables = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    if count > 1:
      variables |= {
        "JAX_COORDINATOR_ADDRESS": where,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
      }
    become = functools.partial(
      _become, variables, (changes or {}).get(number, ())
    )
    runs.append(training.Run(workdir, *_ARGS, *args, change=become, aside=own))
  return runs


def _become(
  variables: Mapping[str, str], changes: Sequence[Callable[[], None]]
) -> None:
  os.environ |= variables
  for change in changes:
    change()

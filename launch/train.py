r"""Trains a model with differential privacy.

  dpdist train --config=digits --workdir=/tmp/digits

Any setting of the config can be changed: --config.privacy.target_epsilon=1.0.
Run the same command again after an interruption: it goes on where it was, and
spends nothing twice.

Exit codes: 0 done; 75 stopped by a signal, saved, run it again; 2 wrong usage,
or settings that the run in --workdir forbids; anything else is a failure.
"""

import os
import sys
import traceback

from absl import flags

from dpdist import errors

from .cli import common_flags
from .cli import config_parts
from .cli import exit_codes
from .cli import flag_parsing
from .cli import messages
from .cli import streams

_CONFIG = common_flags.config()
_WORKDIR = common_flags.workdir(
  "The directory of the run; made if missing, gone on with if not."
)
flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of process 0 of a job of several; else JAX_COORDINATOR_ADDRESS, or"
  " what Slurm, Open MPI or a pod of TPUs says.",
)
flags.DEFINE_integer(
  "num_processes", None, "The job's processes; else JAX_NUM_PROCESSES."
)
flags.DEFINE_integer(
  "process_id", None, "This process's number; else JAX_PROCESS_ID."
)
_START_TIMEOUT = flags.DEFINE_integer(
  "start_timeout", 300, "Seconds in which the processes must find each other."
)


def main() -> int:
  """Returns an exit code."""
  with streams.lasting():
    return _run()


def _run() -> int:
  number = flags.FLAGS.process_id
  if number is None:
    number = os.environ.get("JAX_PROCESS_ID", "0")
  if str(number) == "0":
    print("starting", flush=True)
  # Imported here: flags are parsed, and something is said, before jax is
  # imported.
  import jax

  from dpdist.distributed import watchdog

  try:
    code = _main()
  except BaseException as error:
    if not jax.distributed.is_initialized():
      raise
    message = messages.explain(error)
    if message is None:
      traceback.print_exc()
    code = 1 if message is None else messages.show(message)
  if code in (exit_codes.DONE, exit_codes.PREEMPTED):
    return code
  if jax.distributed.is_initialized():
    watchdog.leave(code)
  return code


def _main() -> int:
  import dpdist
  from dpdist.distributed import preemption
  from dpdist.distributed import startup
  from dpdist.distributed import watchdog
  from dpdist.workdir import fingerprint

  # Whoever may write there can rewrite the whole record.
  os.umask(os.umask(0o077) | 0o002)
  try:
    if _CONFIG.value.clipping.exact_sum:
      fingerprint.pin_threads()
    names = ("coordinator_address", "num_processes", "process_id")
    startup.start(
      {name: flags.FLAGS[name].value for name in names},
      timeout=_START_TIMEOUT.value,
    )
    # For the time after the run, until this process has ended, since the others
    # may be waited for: a process that is asked to stop when all have stopped
    # because of another would count as killed.
    preemption.Signals(lambda name: None).__enter__()
    parts = config_parts.load("config")
    dpdist.train(_CONFIG.value, _WORKDIR.value, **vars(parts))
  except (
    errors.SettingsError,
    errors.MismatchError,
    errors.StartError,
  ) as error:
    return flag_parsing.usage_error(error)
  except errors.Preempted as stopped:
    print(f"{stopped}\ntry: {messages.again()}", file=sys.stderr)
    return exit_codes.PREEMPTED
  except (
    errors.PeerError,
    errors.LostError,
    errors.ConnectError,
  ) as error:
    return messages.show(messages.Message(str(error)))
  except errors.ReadError as error:
    messages.show(messages.Message(str(error)))
    # Python's ordinary end would wait for a thread that still reads.
    watchdog.leave(1)
  return exit_codes.DONE


if __name__ == "__main__":
  flag_parsing.run(main)

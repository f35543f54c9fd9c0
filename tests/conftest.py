"""Eight devices for every test, on any machine.

Many privacy bugs of sharded programs cannot be seen on one device, so tests
fail, and are never skipped, where there are fewer.
"""

import os
import signal

_DEVICES = 8
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + f" --xla_force_host_platform_device_count={_DEVICES}"
  # On a busy machine one device may be that far behind the others.
  + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# As many threads in every process that a test starts, whatever its devices.
os.environ.setdefault("NPROC", str(max(_DEVICES, os.cpu_count() or 1)))

# As in a terminal, also under nohup or in a script's background: a signal that
# is ignored here would be ignored by the processes that tests start and signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import jax  # noqa: E402


def pytest_sessionstart() -> None:
  """Stops at once where the devices could not be had."""
  if jax.device_count() != _DEVICES:
    raise RuntimeError(
      f"the tests need {_DEVICES} devices, found {jax.device_count()}"
    )

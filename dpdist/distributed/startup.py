"""Connects the processes of a job, before any of them touches a device.

The address and number of processes come from the first of these that gives
them: the flags, JAX's own environment variables, the engine that started them.
If none does, the job is this process alone.
"""

from collections.abc import Mapping
import ipaddress
import os
import socket
import sys
import threading
import time
from typing import NamedTuple

import jax

from dpdist import errors

# How long a process that stops waits for the others to stop.
_SHUTDOWN_SECONDS = 10
# How much longer JAX may wait for the others than this module does.
_MARGIN_SECONDS = 60
_VARIABLES = {
  "coordinator_address": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
# By JAX's name of an engine, the variable that counts its processes.
_ENGINES = {
  "slurm": "SLURM_STEP_NUM_TASKS",
  "ompi": "OMPI_COMM_WORLD_SIZE",
}


class Coordinator(NamedTuple):
  """How a process connects to the others.

  The first three fields are None where one of JAX's engines knows them.
  """

  address: str | None  # Host and port of process 0.
  num_processes: int | None
  process_id: int | None
  engine: str | None = None  # JAX's name of the engine.


def find(
  flags: Mapping[str, object], environment: Mapping[str, str]
) -> Coordinator | None:
  """Finds out how to connect to the other processes, if there are any.

  Reads the flags of `_VARIABLES`, None where not given, and the environment.
  """
  given = {name: value for name, value in flags.items() if value is not None}
  if given:
    return _explicit({f"--{name}": flags.get(name) for name in _VARIABLES})
  if environment.get(_VARIABLES["coordinator_address"]):
    return _explicit({v: environment.get(v) for v in _VARIABLES.values()})
  for engine, variable in _ENGINES.items():
    if (_number(environment.get(variable)) or 0) > 1:
      return Coordinator(None, None, None, engine)
  # A pod of TPUs lists its workers here, by itself or through Kubernetes.
  workers = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
  if len(workers) > 1:
    return Coordinator(None, None, None, "gketpu")
  return None


def _explicit(given: Mapping[str, object]) -> Coordinator:
  (where, address), (many, count), (which, number) = given.items()
  missing = [name for name, value in given.items() if value in (None, "")]
  if missing:
    raise errors.StartError(
      f"{where}, {many} and {which} must be given together, but"
      f" {' and '.join(missing)} is missing"
    )
  host, colon, port = str(address).rpartition(":")
  if not host or not colon or not 0 < (_number(port) or 0) < 2**16:
    raise errors.StartError(f"{where} must be HOST:PORT, got {address!r}")
  for name, value in ((many, count), (which, number)):
    if _number(value) is None:
      raise errors.StartError(f"{name} must be a number, got {value!r}")
  if int(str(count)) < 1:
    raise errors.StartError(f"{many} must be at least 1, got {count}")
  if int(str(number)) >= int(str(count)):
    raise errors.StartError(
      f"{which} must be below {many}={count}, got {number}"
    )
  return Coordinator(str(address), int(str(count)), int(str(number)))


def _number(value: object) -> int | None:
  text = str(value)
  return int(text) if text.isascii() and text.isdecimal() else None


def start(flags: Mapping[str, object], *, timeout: int = 300) -> None:
  """Connects to the other processes, if there are any; see `find` for flags.

  Waits up to timeout seconds for the coordinator's name, and for the others.
  Raises StartError if flags or variables make no sense, or if this host would
  give the others an address at which they cannot reach it, else ConnectError.
  Where time runs out inside JAX, the process prints that and exits with 1.
  """
  if timeout < 1:
    raise errors.StartError(
      f"--start_timeout must be at least 1, got {timeout}"
    )
  coordinator = find(flags, os.environ)
  if coordinator is None or coordinator.num_processes == 1:
    return
  began = time.monotonic()
  if coordinator.address is not None:
    addresses = resolve(host_of(coordinator.address), timeout)
    check_own_name(socket.gethostname(), addresses)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # It would swallow signals; see `dpdist.distributed.preemption`.
  jax.config.update("jax_enable_preemption_service", False)
  left = max(1, timeout - int(time.monotonic() - began))
  where = coordinator.address or f"the address that {coordinator.engine} names"
  problem = (
    f"the processes of the job did not connect at {where} within {left} s:"
    " check that all were started, that process 0 runs there and that no"
    " firewall is between"
  )
  # At its timeout JAX would abort the process and print a page of text.
  timer = threading.Timer(left, _give_up, [problem])
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      coordinator.address,
      coordinator.num_processes,
      coordinator.process_id,
      cluster_detection_method=coordinator.engine,
      # Process 0 listens here alone. JAX's default is all networks.
      coordinator_bind_address=(
        coordinator.address if loopback(coordinator.address) else None
      ),
      initialization_timeout=left + _MARGIN_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except Exception as error:
    reason = str(error).splitlines()[0] if str(error) else repr(error)
    raise errors.ConnectError(f"{problem} ({reason})") from error
  finally:
    timer.cancel()


def _give_up(problem: str) -> None:
  print(f"error: {problem}", file=sys.stderr, flush=True)
  os._exit(1)


def resolve(host: str, timeout: float) -> list[str]:
  """Returns the addresses of a host, and waits until its name can be resolved.

  JAX would wait for minutes without a message. In Kubernetes a pod's name can
  be resolved only seconds after the pod starts. Raises StartError for a name
  that never can be.
  """
  end = time.monotonic() + timeout
  while True:
    try:
      found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
      return [str(address[4][0]) for address in found]
    except UnicodeError as error:
      raise errors.StartError(
        f"the coordinator's host {host!r} is no name of a host: {error}"
      ) from error
    except socket.gaierror as error:
      if time.monotonic() >= end:
        raise errors.ConnectError(
          f"the coordinator's host {host!r} has no address after {timeout} s"
          f" ({error.strerror}): check its name, and that this host can resolve"
          " it"
        ) from error
      time.sleep(min(1, max(0.0, end - time.monotonic())))


def host_of(address: str) -> str:
  """Returns the host of HOST:PORT."""
  return address.rpartition(":")[0].strip("[]")


def loopback(address: str | None) -> str:
  """Returns the host of HOST:PORT if it is a loopback address; else "".

  A host name proves nothing: other machines may resolve it otherwise.
  """
  host = host_of(address or "")
  try:
    return host if ipaddress.ip_address(host).is_loopback else ""
  except ValueError:
    return ""


def check_own_name(name: str, coordinator: list[str]) -> None:
  """Refuses a host that would give other hosts 127.0.0.1 as its address.

  Gloo sends the others the address that the host's own name resolves to. Where
  process 0, by its addresses, is on this host too, any will do.
  """
  if any(_is_own(address) for address in coordinator):
    return
  try:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
  except socket.gaierror:
    return  # Gloo looks for an interface then.
  own = {str(address[4][0]) for address in found}
  if all(ipaddress.ip_address(x.split("%")[0]).is_loopback for x in own):
    raise errors.StartError(
      f"the name of this host, {name!r}, must have an address that other hosts"
      f" can reach, got {sorted(own)}: correct it in /etc/hosts"
    )


def _is_own(address: str) -> bool:
  """Returns whether an address is one of this machine."""
  family = socket.AF_INET6 if ":" in address else socket.AF_INET
  with socket.socket(family, socket.SOCK_STREAM) as probe:
    try:
      probe.bind((address, 0))
    except OSError:
      return False
  return True

"""How the processes of a job exchange values and agree on them.

A job is one process, or several that run the same program on a mesh of all
their devices. One of them, the primary process, writes the ledger and the run
directory; the others receive what it found, and stop if it stops.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from dpdist import errors


def is_primary() -> bool:
  """Returns whether this process is the primary process."""
  return jax.process_index() == 0


def run_on_primary(make: Callable[[], Any]) -> Any:
  """Runs `make` in the primary process and returns its result everywhere.

  The result must be JSON-able; it comes back as JSON does. If `make` raises,
  its own exception comes through in the primary process, and the others raise
  PeerError. LostError says that they could not be reached.
  """
  if jax.process_count() == 1:
    return make()
  if not is_primary():
    received = _broadcast(None)
    if "problem" in received:
      raise errors.PeerError(f"process 0 stopped: {received['problem']}")
    return received["value"]
  try:
    value = make()
  except Exception as error:
    _broadcast({"problem": str(error) or repr(error)})
    raise
  # As the other processes get it: tuples become lists.
  return _broadcast({"value": value})["value"]


def run_on_all(make: Callable[[], Any]) -> Any:
  """Runs `make` in all processes; raises PeerError if another's failed."""
  problem: Exception | None = None
  value = None
  try:
    value = make()
  except Exception as error:
    problem = error
  problems = gather("" if problem is None else str(problem) or repr(problem))
  if problem is not None:
    raise problem
  for number, text in enumerate(problems):
    if text:
      raise errors.PeerError(f"process {number} stopped: {text}")
  return value


def gather(text: str) -> list[str]:
  """Returns the texts of all processes, in the order of the processes."""
  if jax.process_count() == 1:
    return [text]
  value = text.encode()
  sizes = _all_gather(np.int32(len(value)))
  padded = np.zeros(int(np.max(sizes)), np.uint8)
  padded[: len(value)] = np.frombuffer(value, np.uint8)
  rows = _all_gather(padded)
  return [
    row[:size].astype(np.uint8).tobytes().decode()
    for row, size in zip(rows, sizes, strict=True)
  ]


def assert_equal(**facts: Any) -> None:
  """Raises DisagreementError unless JSON-able facts agree in all processes."""
  for name, fact in facts.items():
    text = json.dumps(fact, sort_keys=True)
    digests = gather(hashlib.sha256(text.encode()).hexdigest())
    others = [i for i, digest in enumerate(digests) if digest != digests[0]]
    if others:
      raise errors.DisagreementError(
        f"{name} must be the same in all processes, but that of process 0"
        f" (SHA-256 {digests[0][:12]}) is not that of {others}"
      )


def any_process(flag: bool) -> bool:
  """Returns whether a flag is set in any process."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(_all_gather(np.bool_(flag))))


def _all_gather(value: Any) -> np.ndarray:
  with _reaching():
    return np.asarray(multihost_utils.process_allgather(value))


def _broadcast(value: Any) -> Any:
  """Sends the primary process's value to all; other values are ignored."""
  data = json.dumps(value).encode()
  with _reaching():
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    if is_primary():
      padded[:] = np.frombuffer(data, np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(padded))
  return json.loads(sent.astype(np.uint8).tobytes())


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
  """Tells a lost process from a mistake: JAX raises ValueError for both."""
  try:
    yield
  except (ValueError, RuntimeError) as error:
    raise errors.LostError(
      f"the other processes could not be reached: {error}"
    ) from error

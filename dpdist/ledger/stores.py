"""Opens durable key-value stores: local disks and buckets."""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import json
import math
import os
import pathlib
import sys
from typing import Any

import tensorstore as ts

from dpdist.distributed import preemption
from dpdist.files import places

# After this time without an answer a line says so.
TELL_SECONDS = 10.0
# How long is waited where waiting longer would keep a process from its end.
SHORT_SECONDS = 5.0
_TICK_SECONDS = 0.5
_SLOWEST_BYTES = 1 << 20  # A second.


def opening(location: str | os.PathLike[str]) -> ts.Future:
  """Returns a future of a `tensorstore.KvStore`.

  The location is a local path, a URL such as s3://bucket/path, or the JSON of a
  tensorstore key-value store's spec. Raises ValueError for any other, and for a
  store that is not durable.
  """
  try:
    spec = ts.KvStore.Spec(_spec(location))
    _check_durable(spec.to_json())
    return ts.KvStore.open(spec)
  except (ValueError, RuntimeError, TypeError, OverflowError) as error:
    # tensorstore's message has several lines; the first is enough. It repeats
    # the location, which is left out where that may hold a secret.
    reason, named = (str(error).splitlines() or [""])[0], places.shown(location)
    if named != os.fspath(location):
      reason = "it holds more than a place"
    raise ValueError(
      "location must be a path, a URL such as gs://bucket/path or the JSON of"
      f" a key-value store's spec, got {named!r}: {reason}"
    ) from error


def _spec(location: str | os.PathLike[str]) -> Any:
  text = os.fspath(location)
  if text.startswith("{"):
    try:
      return json.loads(text)
    except (ValueError, RecursionError):
      raise ValueError("it is no JSON") from None
  if "://" in text:
    return _with_endpoint(text.rstrip("/") + "/")
  return {"driver": "file", "path": os.path.join(os.path.abspath(text), "")}


def below(location: str | os.PathLike[str], name: str) -> str:
  """Returns the location of a folder in a location; its own for ""."""
  text = os.fspath(location)
  if not text.startswith("{"):
    return text.rstrip("/") + "/" + name
  spec = _spec(text)
  parts = (str(spec.get("path", "")).rstrip("/"), name)
  return json.dumps({**spec, "path": "/".join(filter(None, parts)) + "/"})


def _with_endpoint(url: str) -> Any:
  """Returns the spec of a URL, at the endpoint that Amazon's variables name.

  AWS_ENDPOINT_URL and the region are what Amazon's own clients read, and
  pyarrow for the data; tensorstore reads neither.
  """
  variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
  endpoint = next(filter(None, map(os.environ.get, variables)), "")
  scheme, _, rest = url.partition("://")
  if scheme != "s3" or not endpoint:
    return url
  bucket, _, path = rest.partition("/")
  regions = map(os.environ.get, ("AWS_REGION", "AWS_DEFAULT_REGION"))
  return {
    "driver": "s3",
    "bucket": bucket,
    "path": path,
    "endpoint": endpoint,
    "aws_region": next(filter(None, regions), "us-east-1"),
  }


def _check_durable(spec: dict[str, Any]) -> None:
  """Refuses stores that are not durable, and options that weaken durability."""
  if spec["driver"] not in ("file", "gcs", "s3"):
    raise ValueError(f"driver must be file, gcs or s3, got {spec['driver']!r}")
  unsafe = {"context", "file_io_locking", "file_io_sync"} & spec.keys()
  if unsafe:
    raise ValueError(f"the spec must leave out {sorted(unsafe)}")


# How long stores are waited for, in this process.
_limit = 300.0
# Those that did not answer in time; the next waits for them are short.
_silent: set[str] = set()


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
  """Sets how long each answer of a store may take; 0: without a limit."""
  global _limit
  before, _limit = _limit, seconds
  try:
    yield
  finally:
    _limit = before


def answer(future: ts.Future, what: str, num_bytes: int = 0) -> Any:
  """Waits for a store, which is called `what`, and returns its answer.

  What moves num_bytes may take a second more for each MiB. A store that is slow
  is named on the screen after ten seconds. Raises OSError, with ETIMEDOUT, at
  the limit that `patience` sets, and soon where this process was asked to stop,
  or the store was silent before. What was asked for may still happen then.
  """
  waited, more = 0.0, num_bytes / _SLOWEST_BYTES
  while True:
    try:
      found = future.result(_TICK_SECONDS)
    except TimeoutError:
      if future.done():  # It came just now, or is the store's own.
        return future.result()
    else:
      _silent.discard(what)
      return found
    waited += _TICK_SECONDS
    limit = _limit + more if _limit else math.inf
    if waited == TELL_SECONDS < limit:
      until = f", up to {limit:g} s" if limit < math.inf else ""
      print(
        f"WARNING: {what} has not answered for {waited:g} s; it is waited for"
        f"{until}",
        file=sys.stderr,
        flush=True,
      )
    if what in _silent or preemption.is_asked():
      # A last checkpoint may be large, and its store alive.
      limit = min(limit, SHORT_SECONDS + more)
    if waited >= limit:
      _silent.add(what)
      raise OSError(
        errno.ETIMEDOUT, f"{what} has not answered for {waited:g} s"
      )


def shown(location: str | os.PathLike[str]) -> str:
  """Returns a location as messages name it."""
  text = os.fspath(location)
  try:
    spec = _spec(text) if text.startswith("{") else None
  except ValueError:
    spec = None
  if not isinstance(spec, dict):
    return places.shown(text)
  parts = (spec.get("driver"), spec.get("bucket"), spec.get("path"))
  return " ".join(str(part) for part in parts if part)


def check_apart(
  location: str, others: Mapping[str, str | os.PathLike[str]]
) -> None:
  """Raises ValueError if a location is in another one, which reads all there.

  The others are by their settings' names; "" is none.
  """
  for name, other in others.items():
    if not other:
      continue
    inner, outer = (
      ts.KvStore.Spec(_spec(below(place, ""))).to_json()
      for place in (location, other)
    )
    paths = [str(spec.pop("path", "")).rstrip("/") for spec in (inner, outer)]
    if inner == outer and f"{paths[0]}/".startswith(f"{paths[1]}/"):
      raise ValueError(
        f"it must not be in {name}, whose folder holds nothing else, got"
        f" {shown(location)!r}"
      )


def sync_above(store: ts.KvStore) -> None:
  """Syncs the directories above a store, so that their names are durable."""
  spec = store.spec().to_json()
  if spec["driver"] != "file":
    return
  for folder in pathlib.Path(spec["path"]).parents:
    with contextlib.suppress(OSError):  # Another user's, or not on disk.
      descriptor = os.open(folder, os.O_RDONLY)
      try:
        os.fsync(descriptor)
      finally:
        os.close(descriptor)

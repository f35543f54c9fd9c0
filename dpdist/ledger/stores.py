"""Opens durable key-value stores: local disks and buckets."""

import contextlib
import json
import os
import pathlib
from typing import Any

import tensorstore as ts


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
    # tensorstore's message has several lines; the first is enough.
    reason = (str(error).splitlines() or [""])[0]
    raise ValueError(
      "location must be a path, a URL such as gs://bucket/path or the JSON of"
      f" a key-value store's spec, got {os.fspath(location)!r}: {reason}"
    ) from error


def _spec(location: str | os.PathLike[str]) -> Any:
  text = os.fspath(location)
  if text.startswith("{"):
    try:
      return json.loads(text)
    except (ValueError, RecursionError):
      raise ValueError("it is no JSON") from None
  if "://" in text:
    return text.rstrip("/") + "/"
  return {"driver": "file", "path": os.path.join(os.path.abspath(text), "")}


def _check_durable(spec: dict[str, Any]) -> None:
  """Refuses stores that are not durable, and options that weaken durability."""
  if spec["driver"] not in ("file", "gcs", "s3"):
    raise ValueError(f"driver must be file, gcs or s3, got {spec['driver']!r}")
  unsafe = {"context", "file_io_locking", "file_io_sync"} & spec.keys()
  if unsafe:
    raise ValueError(f"the spec must leave out {sorted(unsafe)}")


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

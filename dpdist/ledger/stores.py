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

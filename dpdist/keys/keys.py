"""Secrets and the named streams of randomness that are derived from them.

One run has one secret of 32 bytes. Everything random in the run (which examples
are drawn, the noise, dropout, the initial parameters) is a function of (secret,
stream, branch, step). So there is no generator state to save, and a resumed run
draws what it would have drawn without the interruption.

A stream is a name, such as "sampling" or "noise". A branch is the name of a
history: steps that are run again, but not bit for bit, need new randomness,
which a new branch gives them.

Keys are derived by HMAC-SHA256 (RFC 2104) with the secret as its key. That is a
pseudorandom function, so streams are as good as independent for everyone who
does not have the secret. The adversary of differential privacy must not have
it: whoever knows the secret can subtract the noise.
"""

import contextlib
import hashlib
import hmac
import operator
import os
import pathlib
import secrets
import stat

import numpy as np

SECRET_BYTES = 32

# One label for each use of HMAC or SHA-256. No label is a prefix of another, so
# that no input of one use can be an input of another use.
_DERIVE = b"dpdist.keys/derive/v2\0"
_HASH = b"dpdist.keys/secret_hash/v1\0"
_INSECURE = b"dpdist.keys/insecure_secret/v1\0"
_WORDS = b"dpdist.keys/prng_words/v1\0"


def load_or_create_secret(path: str | os.PathLike[str]) -> bytes:
  """Reads the secret at `path`, or makes one if there is none.

  A new one comes from the operating system. It is written to another file and
  hard-linked into place, so that it is on disk as a whole or not at all: so
  processes that start at once agree, and an existing file is never overwritten.
  Raises ValueError if the file is no regular one, is accessible to others, or
  is not of `SECRET_BYTES` bytes.
  """
  path = pathlib.Path(path)
  try:
    return _read_secret(path)
  except FileNotFoundError:
    _create_secret(path)
  # Read it back even if this process made one: it may have lost the race, and
  # then another process's secret is in place.
  return _read_secret(path)


def _read_secret(path: pathlib.Path) -> bytes:
  # O_NONBLOCK: opening a named pipe must fail below rather than hang here.
  descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
  with open(descriptor, "rb") as file:
    # Ask the open file, not the path, which could be replaced in between.
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
      raise ValueError(f"path must be a regular file, got {str(path)!r}")
    permissions = stat.S_IMODE(mode)
    if permissions & 0o077:
      raise ValueError(
        f"path must be accessible to its owner alone (mode 0600), got "
        f"{str(path)!r} with mode {permissions:04o}"
      )
    secret = file.read(SECRET_BYTES + 1)
    size = os.fstat(descriptor).st_size
  if len(secret) != SECRET_BYTES:
    raise ValueError(
      f"path must hold exactly {SECRET_BYTES} bytes, got {str(path)!r} with "
      f"{size} bytes"
    )
  return secret


def _create_secret(path: pathlib.Path) -> None:
  """Puts a new secret at `path`, unless a file has appeared there since."""
  draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
  flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
  try:
    with open(os.open(draft, flags, 0o600), "wb") as file:
      # The umask may have removed the owner's permissions; this restores them.
      os.fchmod(file.fileno(), 0o600)
      file.write(os.urandom(SECRET_BYTES))
      file.flush()
      os.fsync(file.fileno())
    # If another process was first, its secret is used.
    with contextlib.suppress(FileExistsError):
      os.link(draft, path)
  finally:
    draft.unlink(missing_ok=True)
  directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)


def insecure_secret(seed: int) -> bytes:
  """Returns a secret that anyone can compute, for tests and benchmarks.

  All bits of the seed count. Such a run has no privacy guarantee.
  """
  value = _nonnegative_int("seed", seed, None)
  return hashlib.sha256(_INSECURE + format(value, "x").encode()).digest()


def secret_hash(secret: bytes) -> str:
  """Returns a name for `secret` that is safe to record and to publish.

  Different secrets have different names, 64 hexadecimal digits. A name does not
  reveal the secret and is unrelated to anything that `derive` returns.
  """
  return _mac("secret", secret, _HASH).hex()


def derive(secret: bytes, stream: str, *, branch: str = "") -> bytes:
  """Returns the key, `SECRET_BYTES` bytes, of one stream of randomness.

  Different (secret, stream, branch) give different ones.
  """
  if not isinstance(stream, str) or not stream:
    raise ValueError(f"stream must be a non-empty str, got {stream!r}")
  if not isinstance(branch, str):
    raise ValueError(f"branch must be a str, got {branch!r}")
  name = stream.encode()
  # With the length in front, a name cannot be confused with what follows.
  message = len(name).to_bytes(8, "big") + name + branch.encode()
  return _mac("secret", secret, _DERIVE + message)


def key_data(key: bytes, step: int | None = None) -> np.ndarray:
  """Returns the words of a JAX key, for `jax.random.wrap_key_data`.

  `jax.random.key(seed)` keeps only 32 bits of its seed, hence words, uint32[2]
  on every platform. They have 64 bits, so the chance that any two of T steps
  share their words is below T^2 / 2^65: 2e-10 for 100,000 steps. None gives
  words for the whole stream, which differ from those of any step.
  """
  message = _WORDS
  if step is not None:
    message += _nonnegative_int("step", step, 63).to_bytes(8, "big")
  return np.frombuffer(_mac("key", key, message)[:8], ">u4").astype(np.uint32)


def _mac(name: str, key: bytes, message: bytes) -> bytes:
  # HMAC pads short keys with zeros: a fixed length keeps keys distinct. The
  # error message leaves out the value, because it is a secret.
  if not isinstance(key, bytes) or len(key) != SECRET_BYTES:
    got = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
    raise ValueError(f"{name} must be {SECRET_BYTES} bytes, got {got}")
  return hmac.digest(key, message, "sha256")


def _nonnegative_int(name: str, value: int, bits: int | None) -> int:
  is_integer = isinstance(value, (int, np.integer))
  if not is_integer or isinstance(value, bool) or value < 0:
    raise ValueError(f"{name} must be a non-negative int, got {value!r}")
  number = operator.index(value)
  if bits is not None and number.bit_length() > bits:
    raise ValueError(f"{name} must be below 2^{bits}, got {value!r}")
  return number

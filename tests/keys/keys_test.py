"""Tests of dpdist.keys."""

import hashlib
import multiprocessing
import os
import pathlib
import re
import stat
import subprocess
import sys

import numpy as np
import pytest

from dpdist.keys import keys

SECRET = bytes(range(32))


def test_a_new_secret_is_kept_and_private_to_its_owner(tmp_path):
  path = tmp_path / "secret"
  secret = keys.load_or_create_secret(path)
  assert len(secret) == keys.SECRET_BYTES == 32
  assert path.read_bytes() == secret
  assert keys.load_or_create_secret(str(path)) == secret
  assert stat.S_IMODE(path.stat().st_mode) == 0o600
  assert os.listdir(tmp_path) == ["secret"]
  assert keys.load_or_create_secret(tmp_path / "other") != secret


def test_a_new_secret_comes_from_the_operating_system(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "urandom", lambda size: SECRET[:size])
  assert keys.load_or_create_secret(tmp_path / "secret") == SECRET


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277, 0o777])
def test_the_mode_does_not_depend_on_the_umask(tmp_path, umask):
  before = os.umask(umask)
  try:
    keys.load_or_create_secret(tmp_path / "secret")
  finally:
    os.umask(before)
  assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o610, 0o604, 0o601])
def test_a_file_that_others_can_access_is_refused(tmp_path, mode):
  path = tmp_path / "secret"
  path.write_bytes(SECRET)
  path.chmod(mode)
  with pytest.raises(ValueError, match=f"{path}.* {mode:04o}"):
    keys.load_or_create_secret(path)
  assert path.read_bytes() == SECRET


def test_a_file_that_its_owner_can_only_read_is_accepted(tmp_path):
  path = tmp_path / "secret"
  path.write_bytes(SECRET)
  path.chmod(0o400)
  assert keys.load_or_create_secret(path) == SECRET


@pytest.mark.parametrize("size", [0, 1, 31, 33, 4096])
def test_a_file_of_another_length_is_refused_and_kept(tmp_path, size):
  path = tmp_path / "secret"
  path.write_bytes(b"x" * size)
  path.chmod(0o600)
  with pytest.raises(ValueError, match=f"32 bytes.*{path}.* {size} bytes"):
    keys.load_or_create_secret(path)
  assert path.read_bytes() == b"x" * size


def test_what_is_not_a_regular_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / "pipe", 0o600)
  with pytest.raises(ValueError, match="regular file"):
    keys.load_or_create_secret(tmp_path / "pipe")


def test_a_missing_directory_is_not_made(tmp_path):
  with pytest.raises(FileNotFoundError):
    keys.load_or_create_secret(tmp_path / "missing" / "secret")
  assert os.listdir(tmp_path) == []


def test_a_secret_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
  path = tmp_path / "secret"
  events = []
  fsync, link = os.fsync, os.link

  def record_fsync(descriptor):
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
      events.append(("directory", path.exists()))
    else:
      events.append((status.st_size, path.exists()))
    fsync(descriptor)

  def record_link(source, target):
    events.append("link")
    link(source, target)

  monkeypatch.setattr(os, "fsync", record_fsync)
  monkeypatch.setattr(os, "link", record_link)
  keys.load_or_create_secret(path)
  assert events == [(32, False), "link", ("directory", True)]


def test_nobody_can_read_a_secret_for_a_moment(tmp_path, monkeypatch):
  """Its file is its owner's alone from the first instant, and while it is
  written to."""
  seen = []
  opened, written = os.open, os.urandom

  def look():
    return [stat.S_IMODE(p.stat().st_mode) & 0o077 for p in tmp_path.iterdir()]

  def open_and_look(path, flags, mode=0o777, **kwargs):
    descriptor = opened(path, flags, mode, **kwargs)
    seen.append(look())
    return descriptor

  def look_and_draw(size):
    seen.append(look())
    return written(size)

  monkeypatch.setattr(os, "open", open_and_look)
  monkeypatch.setattr(os, "urandom", look_and_draw)
  before = os.umask(0)
  try:
    keys.load_or_create_secret(tmp_path / "secret")
  finally:
    os.umask(before)
  assert [0] in seen
  assert not any(mode for modes in seen for mode in modes)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
  def fail(descriptor):
    raise OSError("no space left on device")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(OSError, match="no space"):
    keys.load_or_create_secret(tmp_path / "secret")
  assert os.listdir(tmp_path) == []


def test_the_loser_of_a_race_takes_the_winners_secret(tmp_path, monkeypatch):
  path = tmp_path / "secret"
  link = os.link

  def link_after_another_process(source, target):
    path.write_bytes(SECRET)
    path.chmod(0o600)
    link(source, target)

  monkeypatch.setattr(os, "link", link_after_another_process)
  assert keys.load_or_create_secret(path) == SECRET
  assert path.read_bytes() == SECRET
  assert os.listdir(tmp_path) == ["secret"]


def _create_all(barrier, paths, queue):
  created = []
  for path in paths:
    barrier.wait()
    created.append(keys.load_or_create_secret(path))
  queue.put(created)


def test_processes_that_start_at_once_agree(tmp_path):
  paths = [tmp_path / str(i) for i in range(100)]
  context = multiprocessing.get_context("spawn")
  barrier, queue = context.Barrier(2, timeout=60), context.Queue()
  processes = [
    context.Process(target=_create_all, args=(barrier, paths, queue))
    for _ in range(2)
  ]
  for process in processes:
    process.start()
  first, second = (queue.get(timeout=60) for _ in processes)
  for process in processes:
    process.join(timeout=60)
  assert first == second == [path.read_bytes() for path in paths]
  assert len(set(first)) == len(paths)


def test_derived_values_are_golden():
  assert keys.insecure_secret(7).hex() == (
    "46692d13e16fe6ceadc1b726aea01ba3cd0fd16e2a292ec242c9dacceb4f8c44"
  )
  assert keys.secret_hash(SECRET) == (
    "2d16397063ce967e68f7724c777a86d568e29ca4da90c8815b55d838aa4abca3"
  )
  assert keys.derive(SECRET, "noise").hex() == (
    "d1f867285b59800609e8bd092d1cc360fd62b0cac406a5d3bc21b7ece75cd77d"
  )
  assert keys.derive(SECRET, "noise", branch="3").hex() == (
    "c035ad53e6d7b7afc6f464623b6d6cb2278b8ff74d7ba64c215dae4691772623"
  )
  assert keys.key_data(SECRET).tolist() == [264395009, 3994291906]
  assert keys.key_data(SECRET, 0).tolist() == [2748903763, 3859099969]
  assert keys.key_data(SECRET, 2**63 - 1).tolist() == [3115642906, 3760084351]


def test_keys_of_streams_branches_and_secrets_are_distinct():
  secrets = [SECRET, SECRET[:-1] + b"\0", bytes(32)]
  streams = ["sampling", "noise", "model_rng", "init", "n", "no", "noise\0"]
  branches = ["", "0", "1", "noise", "\0", "0" * 64]
  derived = [
    keys.derive(secret, stream, branch=branch)
    for secret in secrets
    for stream in streams
    for branch in branches
  ]
  assert len(set(derived)) == len(derived)
  assert {len(key) for key in derived} == {32}


def test_words_of_steps_and_keys_are_distinct():
  steps = [None, *range(1000), 2**32, 2**32 + 7, 2**63 - 1]
  words = [
    tuple(keys.key_data(key, step).tolist())
    for key in (SECRET, bytes(32))
    for step in steps
  ]
  assert len(set(words)) == len(words)
  array = keys.key_data(SECRET, np.int64(5))
  assert array.dtype == np.uint32
  assert array.shape == (2,)
  assert array.tolist() == keys.key_data(SECRET, 5).tolist()


def test_the_hash_of_a_secret_is_domain_separated():
  recorded = keys.secret_hash(SECRET)
  assert re.fullmatch("[0-9a-f]{64}", recorded)
  assert recorded != hashlib.sha256(SECRET).hexdigest()
  assert recorded != keys.derive(SECRET, "secret_hash").hex()
  assert recorded != keys.secret_hash(bytes(32))
  words = keys.key_data(SECRET).astype(">u4").tobytes().hex()
  assert words not in recorded


def test_all_bits_of_an_insecure_seed_count():
  seeds = [0, 7, 2**32 + 7, 2**64 + 7, 2**1000 + 7]
  secrets = [keys.insecure_secret(seed) for seed in seeds]
  assert len(set(secrets)) == len(seeds)
  assert keys.insecure_secret(np.uint8(7)) == keys.insecure_secret(7)


@pytest.mark.parametrize("seed", [-1, True, 7.0, "7", b"7", None])
def test_an_insecure_seed_that_is_no_seed_is_refused(seed):
  with pytest.raises(ValueError, match=f"seed must .* got {seed!r}"):
    keys.insecure_secret(seed)


@pytest.mark.parametrize("stream", ["", b"noise", None, 3])
def test_a_stream_without_a_name_is_refused(stream):
  with pytest.raises(ValueError, match="stream must be"):
    keys.derive(SECRET, stream)


@pytest.mark.parametrize("branch", [None, 0, b"0"])
def test_a_branch_without_a_name_is_refused(branch):
  with pytest.raises(ValueError, match="branch must be a str"):
    keys.derive(SECRET, "noise", branch=branch)


@pytest.mark.parametrize("number", [-1, True, 1.0, "1", 2**64])
def test_a_step_that_is_no_number_is_refused(number):
  with pytest.raises(ValueError, match=f"step must .* got {number!r}"):
    keys.key_data(SECRET, number)


def test_the_largest_step_is_that_of_an_int64():
  with pytest.raises(ValueError, match="below 2\\^63"):
    keys.key_data(SECRET, 2**63)


@pytest.mark.parametrize("secret", [b"", b"hunter2", "h" * 32, None])
def test_a_bad_secret_is_refused_but_not_shown(secret):
  for call in (
    keys.secret_hash,
    keys.key_data,
    lambda secret: keys.derive(secret, "noise"),
  ):
    with pytest.raises(ValueError, match="must be 32 bytes, got") as error:
      call(secret)
    assert "hunter2" not in str(error.value)
    assert "hhh" not in str(error.value)


def test_keys_import_no_jax():
  program = (
    "import sys; sys.modules['jax'] = None; from dpdist.keys import keys; "
    "keys.key_data(keys.insecure_secret(1))"
  )
  root = pathlib.Path(keys.__file__).parents[2]
  subprocess.run([sys.executable, "-c", program], check=True, cwd=root)

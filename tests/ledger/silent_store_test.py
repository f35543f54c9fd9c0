"""Stores that stop answering: every wait for them ends, and says so."""

import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dpdist import errors
from dpdist.distributed import preemption
from dpdist.ledger import data_budget
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.ledger import stores
from tests.support import object_store

_ROOT = pathlib.Path(__file__).parents[2]
_BUCKET = "silent"


class _Line(threading.Thread):
  """Passes bytes on to a server, until it is told to be silent."""

  def __init__(self, port):
    super().__init__(daemon=True)
    self._port = port
    self._listener = socket.create_server(("127.0.0.1", 0))
    self.port = self._listener.getsockname()[1]
    self.is_silent = False
    self._pairs = {}
    self._is_over = False

  def stop(self):
    self._is_over = True
    self.join()
    for end in (self._listener, *self._pairs):
      end.close()

  def run(self):
    while not self._is_over:
      known = [self._listener, *self._pairs]
      readable, _, _ = select.select(known, [], [], 0.05)
      if self.is_silent:
        time.sleep(0.05)
        continue
      for end in readable:
        if end is self._listener:
          near = end.accept()[0]
          far = socket.create_connection(("127.0.0.1", self._port))
          self._pairs |= {near: far, far: near}
          continue
        try:
          data = end.recv(1 << 16)
          self._pairs[end].sendall(data)
        except (OSError, KeyError):
          data = b""
        if not data:
          for each in (end, self._pairs.pop(end, end)):
            self._pairs.pop(each, None)
            each.close()


@pytest.fixture(scope="module")
def store():
  with object_store.serving(_BUCKET) as port:
    yield port


@pytest.fixture
def line(store, monkeypatch):
  found = _Line(store)
  found.start()
  monkeypatch.setattr(stores, "_silent", set())
  for name, value in _variables(found).items():
    monkeypatch.setenv(name, value)
  yield found
  found.stop()


def _variables(line):
  return {
    **object_store.VARIABLES,
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{line.port}",
  }


def test_a_wait_ends_at_the_limit_and_the_next_ones_soon(
  line, monkeypatch, capsys
):
  monkeypatch.setattr(stores, "TELL_SECONDS", 0.5)
  monkeypatch.setattr(stores, "SHORT_SECONDS", 0.5)
  location = f"s3://{_BUCKET}/limit"
  log = records.Log(location, lambda record: None)
  log.acquire()
  line.is_silent = True
  said = rf": the store s3://{_BUCKET}/\w+/?\w* has not answered for"
  with stores.patience(2.0):
    start = time.monotonic()
    with pytest.raises(errors.LedgerError, match=said):
      log.append("a")
    first = time.monotonic() - start
    assert capsys.readouterr().err.count("it is waited for, up to 2 s") == 1
    with pytest.raises(errors.LedgerError, match=said):
      data_budget.DataBudget(f"s3://{_BUCKET}/other", "d" * 64)
    start = time.monotonic()
    log.close()
    # Not a wait at the limit for each thing that is still to be written.
    assert time.monotonic() - start < first + 4
  line.is_silent = False
  assert ledger_lib.Ledger(f"s3://{_BUCKET}/new").is_new


def test_a_request_to_stop_shortens_the_wait(line, monkeypatch):
  monkeypatch.setattr(stores, "SHORT_SECONDS", 0.5)
  line.is_silent = True
  with preemption.Notice() as notice, stores.patience(100.0):
    threading.Timer(0.7, setattr, (notice, "received", True)).start()
    with pytest.raises(errors.LedgerError, match="not answered for 1"):
      ledger_lib.Ledger(f"s3://{_BUCKET}/asked")
  assert not preemption.is_asked()


def test_a_large_last_checkpoint_has_time_after_a_request_to_stop(
  line, monkeypatch
):
  """Its store is alive, and takes a second for each MiB."""
  monkeypatch.setattr(stores, "SHORT_SECONDS", 0.5)
  line.is_silent = True
  with preemption.Notice() as notice, stores.patience(100.0):
    notice.received = True
    store = stores.answer(stores.opening(f"s3://{_BUCKET}/large"), "it")
    threading.Timer(1.2, setattr, (line, "is_silent", False)).start()
    stores.answer(store.write("key", b"x" * (3 << 20)), "it", 3 << 20)


def test_a_store_that_answers_late_is_waited_for(line):
  line.is_silent = True
  threading.Timer(1.2, setattr, (line, "is_silent", False)).start()
  assert ledger_lib.Ledger(f"s3://{_BUCKET}/late").is_new


def test_a_location_is_shown_in_a_line():
  spec = {"driver": "s3", "bucket": "b", "path": "p/", "endpoint": "http://x"}
  assert stores.shown(json.dumps(spec)) == "s3 b p/"
  assert stores.shown("s3://b/p") == "s3://b/p"


@pytest.mark.slow
@pytest.mark.parametrize("is_asked", [False, True])
def test_a_run_on_a_store_that_dies_ends_by_itself(line, tmp_path, is_asked):
  command = [
    *(sys.executable, "-m", "launch.train", "--config=digits"),
    *(
      f"--workdir={tmp_path}/run",
      f"--config.ledger=s3://{_BUCKET}/{is_asked}",
    ),
    *("--config.insecure_seed=7", "--config.privacy.num_steps=5000"),
    *("--config.model.width=64", "--config.eval_every=20"),
    f"--config.store_timeout={300 if is_asked else 12}",
  ]
  with (
    (tmp_path / "said").open("w") as said,
    subprocess.Popen(
      command,
      cwd=_ROOT,
      env={**os.environ, **_variables(line)},
      stdout=said,
      stderr=said,
    ) as run,
  ):
    try:
      steps = tmp_path / "run" / "metrics.jsonl"
      _wait(lambda: steps.exists() and steps.read_text().count("\n") > 3, 200)
      line.is_silent = True
      if is_asked:
        time.sleep(12)
        run.send_signal(signal.SIGTERM)
      assert run.wait(90) in (1, 75)
    finally:
      run.kill()
  text = (tmp_path / "said").read_text()
  assert "has not answered for 10 s" in text
  # The store is back, and so is the run, for no more than it had charged.
  line.is_silent = False
  assert ledger_lib.Ledger(f"s3://{_BUCKET}/{is_asked}").spent_steps > 0


def _wait(is_so, seconds):
  deadline = time.monotonic() + seconds
  while not is_so():
    assert time.monotonic() < deadline
    time.sleep(0.1)

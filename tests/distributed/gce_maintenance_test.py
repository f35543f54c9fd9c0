"""Google's metadata server, as documented, and a run that it tells to stop."""

import contextlib
import functools
import http.server
import os
import threading
import time
import urllib.parse

import pytest

from dpdist.distributed import gce_maintenance
from dpdist.distributed import preemption
from tests.support import training

_PREFIX = "/computeMetadata/v1/instance/"


class _Metadata:
  """A server of values that change; a context manager.

  Attributes:
    host: where it listens.
    asked: keys, in the order in which they were asked for.
  """

  def __init__(self, **values):
    self._values = {k.replace("_", "-"): v for k, v in values.items()}
    self._changed = threading.Condition()
    self.asked = []
    self.flavor = "Google"
    self._server = http.server.ThreadingHTTPServer(
      ("127.0.0.1", 0), functools.partial(_Handler, self)
    )
    self.host = f"127.0.0.1:{self._server.server_port}"

  def __enter__(self):
    threading.Thread(target=self._server.serve_forever).start()
    return self

  def __exit__(self, *unused):
    with self._changed:
      self._values = None
      self._changed.notify_all()
    self._server.shutdown()
    self._server.server_close()

  def change(self, key, value):
    with self._changed:
      self._values[key] = value
      self._changed.notify_all()

  def wait_until_asked(self, times, key):
    with self._changed:
      assert self._changed.wait_for(
        lambda: self.asked.count(key) >= times, timeout=60
      )

  def value(self, key, last_etag, seconds):
    """Holds back what is known already."""
    with self._changed:
      self.asked.append(key)
      self._changed.notify_all()
      self._changed.wait_for(
        lambda: self._values is None or self._values[key] != last_etag,
        timeout=seconds,
      )
      return self._values and self._values[key]


class _Handler(http.server.BaseHTTPRequestHandler):
  def __init__(self, metadata, *args):
    self._metadata = metadata
    super().__init__(*args)

  def do_GET(self):
    if self.headers["Metadata-Flavor"] != "Google":
      self.send_error(403)
      return
    path, _, query = self.path.partition("?")
    asked = dict(urllib.parse.parse_qsl(query))
    value = self._metadata.value(
      path.removeprefix(_PREFIX),
      asked.get("last_etag") if "wait_for_change" in asked else None,
      float(asked.get("timeout_sec", 0)),
    )
    if value is None:
      self.close_connection = True
      return
    self.send_response(200)
    self.send_header("Metadata-Flavor", self._metadata.flavor)
    self.send_header("ETag", value)
    self.send_header("Content-Length", str(len(value)))
    self.end_headers()
    self.wfile.write(value.encode())

  def log_message(self, *unused):
    pass


class _Told:
  """Keeps what it is called with."""

  def __init__(self):
    self._some = threading.Event()
    self.reasons = []

  def __call__(self, reason):
    self.reasons.append(reason)
    self._some.set()

  def wait(self):
    assert self._some.wait(60)
    return self.reasons


@pytest.fixture
def told(monkeypatch):
  """Enters the notices of a server; tells what they told."""

  def enter(server, stack):
    told = _Told()
    monkeypatch.setenv("GCE_METADATA_HOST", server.host)
    # A machine may have proxies for all else.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    stack.enter_context(gce_maintenance.Maintenance(told))
    return told

  return enter


@pytest.fixture
def stack():
  with contextlib.ExitStack() as stack:
    yield stack


def test_what_ends_a_machine_is_told_and_a_migration_is_not(told, stack):
  server = stack.enter_context(
    _Metadata(maintenance_event="NONE", preempted="FALSE")
  )
  found = told(server, stack)
  server.wait_until_asked(2, "maintenance-event")
  server.change("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
  server.wait_until_asked(3, "maintenance-event")
  assert found.reasons == []
  server.change("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
  assert found.wait() == ["the machine's maintenance"]


def test_a_job_that_comes_back_before_the_maintenance_may_go_on(told, stack):
  server = stack.enter_context(
    _Metadata(
      maintenance_event="TERMINATE_ON_HOST_MAINTENANCE", preempted="FALSE"
    )
  )
  found = told(server, stack)
  server.wait_until_asked(2, "maintenance-event")
  server.wait_until_asked(2, "preempted")
  assert found.reasons == []
  server.change("preempted", "TRUE")
  assert found.wait() == ["the machine's preemption"]


@pytest.mark.slow
def test_a_stranger_in_the_servers_place_is_not_believed(told, stack):
  server = stack.enter_context(
    _Metadata(maintenance_event="NONE", preempted="TRUE")
  )
  server.flavor = "Vanilla"
  found = told(server, stack)
  server.wait_until_asked(2, "preempted")
  assert found.reasons == []
  server.flavor = "Google"
  assert found.wait() == ["the machine's preemption"]


def test_elsewhere_nobody_is_asked(monkeypatch, tmp_path):
  monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
  product = tmp_path / "product_name"
  monkeypatch.setattr(gce_maintenance, "_PRODUCT", product)
  assert gce_maintenance.server() == ""
  product.write_text("Standard PC\n")
  assert gce_maintenance.server() == ""
  before = threading.active_count()
  with gce_maintenance.Maintenance(_Told()):
    assert threading.active_count() == before
  product.write_text("Google Compute Engine\n")
  assert gce_maintenance.server() == "metadata.google.internal"


@pytest.mark.slow
def test_a_run_saves_and_ends_before_its_machine_does(stack, tmp_path):
  server = stack.enter_context(
    _Metadata(maintenance_event="NONE", preempted="FALSE")
  )
  run = training.Run(
    tmp_path / "run", change=functools.partial(_on_google, server.host)
  )
  while run.process.is_alive() and training.last_released(run.workdir) < 1:
    time.sleep(0.01)
  server.change("preempted", "TRUE")
  assert run.wait() == 75, run.screen
  # In the step in which it heard of it, or in the next.
  released = training.check(tmp_path / "run")
  assert released in (2, 3)
  stopped = f"stopped after step {released} (the machine's preemption)"
  assert stopped in run.screen


def _on_google(host):
  """In the run: where the server is, and that step 2 waits for its word."""
  os.environ["GCE_METADATA_HOST"] = host
  receive, arrived = preemption.Notice._receive, threading.Event()

  def observed(notice, reason):
    receive(notice, reason)
    arrived.set()

  preemption.Notice._receive = observed
  wait = functools.partial(arrived.wait, 60)
  training.before("dpdist.reporting.metrics:Writer:write", 2, wait)()

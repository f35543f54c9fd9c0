"""What a watch hears, and from whom it does not."""

import contextlib
import json
import socket
import time

import jax
import pytest

from dpdist.distributed import collectives
from dpdist.distributed import peers
from dpdist.distributed import progress as progress_lib
from dpdist.distributed import watchdog


@pytest.fixture
def pair():
  mine, theirs = socket.socketpair()
  with mine, theirs:
    yield peers.Peer(mine, "a token"), theirs


def _line(message):
  return json.dumps(message).encode() + b"\n"


def test_a_peer_is_known_by_its_token(pair):
  peer, other = pair
  other.sendall(_line(peers.greeting("a token", 3, "host-b"))[:9])
  assert peer.receive() == []
  assert peer.name == ""
  other.sendall(_line(peers.greeting("a token", 3, "host-b"))[9:])
  other.sendall(_line({"beat": [6, "reading", 0.5]}) + _line({"bye": True}))
  assert peer.receive() == [{"bye": True}]
  assert (peer.number, peer.name) == (3, "process 3 (host-b)")
  assert peer.status(0.0)[:3] == (6, "reading", 0.5)
  other.close()
  assert peer.receive() is None


@pytest.mark.parametrize(
  "data",
  [
    b"GET / HTTP/1.1\r\n\r\n",
    _line(peers.greeting("another", 3, "host-b")),
    _line({"failed": "a lie"}),
    _line(["hello"]),
    _line({"hello": 7, "number": 3, "host": ""}),
    b"\xff\n",
    b"[" * 50_000 + b"\n",  # Deeper than Python counts.
  ],
)
def test_a_stranger_is_not_heard(pair, data):
  peer, other = pair
  other.sendall(data)
  assert peer.receive() is None
  assert peer.name == ""


def test_a_process_alone_watches_nobody():
  with watchdog.Watchdog(progress_lib.Progress(), 600.0) as alone:
    assert alone is not None
  with (
    pytest.raises(ZeroDivisionError),
    watchdog.Watchdog(progress_lib.Progress(), 600.0),
  ):
    1 / 0  # noqa: B018


@pytest.fixture
def one_of_two(monkeypatch):
  """Makes this process one of a job of two, whose other one is the test."""
  server_at = {}
  monkeypatch.setattr(
    watchdog.distributed.global_state, "coordinator_address", "127.0.0.1:1"
  )
  monkeypatch.setattr(watchdog, "_abort_slowly", lambda: lambda: None)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(collectives, "run_on_all", lambda make: make())

  def become(number, primary=None):
    def run_on_primary(make):
      server_at.update(primary or make())
      return server_at

    monkeypatch.setattr(jax, "process_index", lambda: number)
    monkeypatch.setattr(collectives, "run_on_primary", run_on_primary)
    return server_at

  return become


def _call(server_at):
  return socket.create_connection(("127.0.0.1", server_at["port"]), 10)


def test_once_all_are_there_no_stranger_gets_in_or_stays(one_of_two):
  server_at = one_of_two(0)
  with watchdog.Watchdog(progress_lib.Progress(), 600.0):
    silent = _call(server_at)
    with silent, _call(server_at) as loud, _call(server_at) as other:
      loud.sendall(b"[" * 50_000 + b"\n")
      assert loud.recv(1) == b""
      other.sendall(_line(peers.greeting(server_at["token"], 1, "host-b")))
      with contextlib.suppress(ConnectionResetError):
        assert silent.recv(1) == b""
      with pytest.raises(ConnectionRefusedError):
        _call(server_at)
      # Who is known is heard and told as before.
      assert json.loads(other.makefile().readline())["beat"][1] == "starting"
      other.sendall(_line({"bye": True}))


def test_nobody_waits_for_a_cause_from_a_primary_that_has_left(one_of_two):
  with socket.create_server(("127.0.0.1", 0)) as server:
    one_of_two(
      1, {"port": server.getsockname()[1], "token": "t", "host_name": "host-a"}
    )
    watching = watchdog.Watchdog(progress_lib.Progress(), 600.0)
    watching.__enter__()
    primary, _ = server.accept()
    with primary:
      primary.sendall(_line({"bye": True}))
    began = time.monotonic()
    watching.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert time.monotonic() < began + watchdog._PATIENCE_SECONDS
    # It is undone as after a block that ends well, for the tests that follow.
    watching._is_over = True
    watching._wake_up()
    watching._thread.join()
    watching._stack.close()


@pytest.mark.parametrize(
  ("address", "own"),
  [("127.0.0.1:1", True), ("127.9.9.9:1", True), ("localhost:1", False)],
)
def test_processes_of_one_machine_are_not_there_for_others(
  one_of_two, monkeypatch, address, own
):
  monkeypatch.setattr(
    watchdog.distributed.global_state, "coordinator_address", address
  )
  one_of_two(0)
  with watchdog.Watchdog(progress_lib.Progress(), 600.0) as watching:
    listens_at = watching._server.getsockname()[0]
  assert (f"{listens_at}:1" == address) == own

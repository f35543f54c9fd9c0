"""What a watch hears, and from whom it does not."""

import json
import socket

import pytest

from dpdist import peers
from dpdist import progress as progress_lib
from dpdist import watch


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
  assert peer.sign(0.0)[:3] == (6, "reading", 0.5)
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
  ],
)
def test_a_stranger_is_not_heard(pair, data):
  peer, other = pair
  other.sendall(data)
  assert peer.receive() is None
  assert peer.name == ""


def test_a_process_alone_watches_nobody():
  with watch.Watch(progress_lib.Progress(), 600.0) as alone:
    assert alone is not None
  with (
    pytest.raises(ZeroDivisionError),
    watch.Watch(progress_lib.Progress(), 600.0),
  ):
    1 / 0  # noqa: B018

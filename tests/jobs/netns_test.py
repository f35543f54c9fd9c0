"""Two hosts: network namespaces with names and addresses of their own."""

import contextlib
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.support import training

pytestmark = pytest.mark.cluster

_ROOT = pathlib.Path(__file__).parents[2]
_BRIDGE = "dpdist0"
_HOSTS = ("dpdist-a", "dpdist-b")
_ADDRESSES = ("10.77.0.10", "10.77.0.11")


def _ip(*words, check=True):
  return subprocess.run(
    ["ip", *words], check=check, capture_output=True, text=True
  )


def _clear():
  for name in _HOSTS:
    _ip("netns", "delete", name, check=False)
  _ip("link", "delete", _BRIDGE, check=False)


@pytest.fixture(scope="module")
def network():
  """Two hosts at one switch."""
  missing = [x for x in ("ip", "unshare") if shutil.which(x) is None]
  if missing or os.geteuid():
    reason = f"wants root, iproute2 and util-linux; missing: {missing}"
    if os.environ.get("CI"):
      pytest.fail(reason)
    pytest.skip(reason)
  _clear()
  if _ip("netns", "add", _HOSTS[0], check=False).returncode:
    pytest.skip("network namespaces may not be made here")
  _ip("netns", "delete", _HOSTS[0])
  with contextlib.ExitStack() as stack:
    stack.callback(_clear)
    _ip("link", "add", _BRIDGE, "type", "bridge")
    _ip("link", "set", _BRIDGE, "up")
    for number, (name, address) in enumerate(
      zip(_HOSTS, _ADDRESSES, strict=True)
    ):
      cable = f"dpdistv{number}"
      _ip("netns", "add", name)
      _ip(
        *("link", "add", cable, "type", "veth"),
        *("peer", "name", "eth0", "netns", name),
      )
      _ip("link", "set", cable, "master", _BRIDGE, "up")
      inside = ("netns", "exec", name, "ip")
      _ip(*inside, "link", "set", "lo", "up")
      _ip(*inside, "address", "add", f"{address}/24", "dev", "eth0")
      _ip(*inside, "link", "set", "eth0", "up")
    yield


def _start(number, workdir, folder, own_address, *args):
  """The command on a host, whose own name has an address in its hosts file."""
  name = _HOSTS[number]
  other = 1 - number
  hosts = folder / f"hosts-{number}"
  hosts.write_text(
    f"127.0.0.1 localhost\n{own_address} {name}\n"
    f"{_ADDRESSES[other]} {_HOSTS[other]}\n"
  )
  command = [
    *(sys.executable, "-m", "launch.train", *training.ARGS),
    *("--config.clipping.exact_sum=True", "--config.eval_every=6"),
    f"--coordinator_address={_HOSTS[0]}:7777",
    *("--num_processes=2", f"--process_id={number}"),
    *(f"--workdir={workdir}", *args),
  ]
  inside = (
    f"hostname {name} && mount --bind {shlex.quote(str(hosts))} /etc/hosts"
    f" && exec {shlex.join(command)}"
  )
  return subprocess.Popen(
    [
      *("ip", "netns", "exec", name, "unshare", "--uts", "--mount"),
      *("sh", "-c", inside),
    ],
    cwd=_ROOT,
    env=os.environ | {"XLA_FLAGS": ""},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_two_hosts_train_as_one_process_does(network, tmp_path):
  one = training.Run(
    tmp_path / "one",
    "--config.clipping.exact_sum=True",
    "--config.eval_every=6",
  )
  assert one.wait() == 0, one.screen
  workdir = tmp_path / "run"
  runs = [
    _start(number, workdir, tmp_path, _ADDRESSES[number]) for number in (0, 1)
  ]
  said = [run.communicate(timeout=400)[0] for run in runs]
  assert [run.returncode for run in runs] == [0, 0], said
  training.check(workdir)
  assert training.outcome(workdir) == training.outcome(tmp_path / "one")


def test_a_host_that_would_tell_the_others_its_loopback_is_refused(
  network, tmp_path
):
  run = _start(1, tmp_path / "run", tmp_path, "127.0.1.1")
  said, _ = run.communicate(timeout=200)
  assert run.returncode == 2, said
  assert f"the name of this host, '{_HOSTS[1]}', must have an address" in said
  assert "127.0.1.1" in said
  assert "Traceback" not in said

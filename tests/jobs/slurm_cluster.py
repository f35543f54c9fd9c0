"""A Slurm cluster of two nodes on this machine, in a directory of its own.

Wants Debian's slurmctld, slurmd, slurm-client and munge, and root. Nothing of a
Slurm or munge that the machine has is touched: keys, sockets, ports and states
are the cluster's own.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmctldPort={ports[0]}
KillWait=60
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 State=UP PriorityTier=10
"""


_HOSTS = pathlib.Path("/etc/hosts")
_NAMES = "127.0.0.1 n1 n2  # two nodes of a test\n"


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
  """Starts the cluster; yields the variables of its clients."""
  missing = [
    name
    for name in ("munged", "slurmctld", "slurmd", "sbatch")
    if shutil.which(name) is None
  ]
  if missing:
    raise RuntimeError(
      f"{missing} are missing: apt-get install slurmctld slurmd slurm-client"
      " munge"
    )
  started: list[subprocess.Popen[bytes]] = []
  folder = pathlib.Path(tempfile.mkdtemp())
  # Of root, and to be looked into by others, as munge demands.
  folder.chmod(0o755)
  (folder / "munge").mkdir(mode=0o755)
  (folder / "state").mkdir()
  key = folder / "munge/key"
  key.touch(0o600)
  key.write_bytes(os.urandom(1024))
  configuration = folder / "slurm.conf"
  configuration.write_text(
    _CONFIGURATION.format(
      host=socket.gethostname().partition(".")[0],
      folder=folder,
      ports=_free_ports(3),
    )
  )
  variables = {**os.environ, "SLURM_CONF": str(configuration)}

  def start(*words: str) -> None:
    with open(folder / "log", "ab") as log:
      started.append(
        subprocess.Popen(words, env=variables, stdout=log, stderr=log)
      )

  _name_nodes()
  try:
    munge = folder / "munge"
    start(
      *("munged", "--foreground", "--force", f"--key-file={key}"),
      *(f"--socket={munge}/socket", f"--pid-file={munge}/pid"),
      *(f"--seed-file={munge}/seed", "--num-threads=2"),
    )
    _wait(lambda: (munge / "socket").exists(), folder)
    start("slurmctld", "-D", "-c")
    for node in ("n1", "n2"):
      start("slurmd", "-D", "-N", node)
    _wait(lambda: _idle(variables) == 2, folder)
    yield variables
  finally:
    for process in reversed(started):
      process.terminate()
    for process in started:
      try:
        process.wait(timeout=60)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _HOSTS.write_text(_HOSTS.read_text().replace(_NAMES, ""))
    shutil.rmtree(folder, ignore_errors=True)


def _name_nodes() -> None:
  """Makes the nodes' names known, as a cluster's are."""
  text = _HOSTS.read_text()
  if _NAMES not in text:  # It is there after a test that was killed.
    _HOSTS.write_text(text.rstrip("\n") + "\n" + _NAMES)


def _idle(variables: dict[str, str]) -> int:
  done = subprocess.run(
    ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"],
    env=variables,
    capture_output=True,
    text=True,
  )
  return done.stdout.split().count("idle")


def _wait(is_so, folder: pathlib.Path) -> None:
  deadline = time.monotonic() + 120
  while not is_so():
    if time.monotonic() > deadline:
      raise TimeoutError((folder / "log").read_text())
    time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    servers = [stack.enter_context(socket.socket()) for _ in range(count)]
    for server in servers:
      server.bind(("127.0.0.1", 0))
    return [server.getsockname()[1] for server in servers]

"""Writes a Slurm batch script that requeues itself."""

from collections.abc import Mapping
import dataclasses
import shlex

from . import job as job_lib

TOOL = ("sbatch", "Slurm's client (Debian: slurm-client)")

# From the signal to the end of the time limit.
_SAVE_SECONDS = 60
# The first wait after a failure is twice as long, and each next one twice that.
_BACK_OFF_SECONDS = 10
# How long processes have to save or to give up when one of them has ended.
_WAIT_SECONDS = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(job_lib.Job):
  """A job under Slurm."""

  processes_per_node: int = job_lib.count(1, "Processes of a node.")
  cpus: int = job_lib.count(1, "Processors of a process.")
  gpus: int = job_lib.count(0, "GPUs of a process.", at_least=0)
  memory: str = job_lib.word(
    "", "Memory of a node, as 16G; without it the partition's."
  )
  time_limit: int = job_lib.count(
    0, "Minutes that the job may run; without it the partition's.", at_least=0
  )
  partition: str = job_lib.word("", "The partition; without it the cluster's.")
  account: str = job_lib.word(
    "", "The account that pays; without it the user's."
  )
  python: str = job_lib.flag("python", "The interpreter on the machines.")


def files(job: Job) -> Mapping[str, str]:
  """Returns the batch script, by its file name."""
  return {f"{job.name}.sbatch": _script(job)}


def command(job: Job, folder: str) -> list[str]:
  """Returns the command that submits the files in a folder."""
  return ["sbatch", f"{folder}/{job.name}.sbatch"]


def _script(job: Job) -> str:
  options = {
    "job-name": job.name,
    "nodes": job.nodes,
    "ntasks-per-node": job.processes_per_node,
    "cpus-per-task": job.cpus,
    "gpus-per-task": job.gpus,
    "mem": job.memory,
    "time": job.time_limit,
    "partition": job.partition,
    "account": job.account,
    "output": f"{job.name}-%j.log",
    "open-mode": "append",
    # To the processes, and not to this script, which waits for them.
    "signal": f"TERM@{_SAVE_SECONDS}",
  }
  lines = [
    f"#SBATCH --{name}={value}" for name, value in options.items() if value
  ]
  return f"""\
#!/bin/bash
{chr(10).join(lines)}
#SBATCH --requeue

# No pipe after srun: its exit status decides. One process that ends does not
# take those along that still save, but they have {_WAIT_SECONDS} seconds. From
# Slurm 22.05 on, srun does not hear from sbatch how many processors a task has.
srun --cpus-per-task={job.cpus} \\
  --kill-on-bad-exit=0 --wait={_WAIT_SECONDS} \\
  {shlex.join(job.train(job.python))}
status=$?

again() {{
  echo "exit status $status: $1; requeued" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit "$status"
}}

# 75: stopped, and saved. 2: refused, and would be again. Anything else is a
# failure, and those are counted; Slurm itself requeues what it preempts and
# what a node's failure ends, and this script does not see it.
counted={job.name}-$SLURM_JOB_ID.failures
case $status in
  0 | 2) rm -f "$counted" ;;
  75) again "stopped and saved" ;;
  *)
    failures=$(($(cat "$counted" 2>/dev/null || echo 0) + 1))
    echo "$failures" >"$counted"
    if [ "$failures" -le {job.max_restarts} ]; then
      seconds=$((failures < 6 ? {_BACK_OFF_SECONDS} << failures : 600))
      sleep "${{RESTART_SECONDS:-$seconds}}"
      again "failure $failures of {job.max_restarts} that may be"
    fi
    rm -f "$counted"
    ;;
esac
exit "$status"
"""

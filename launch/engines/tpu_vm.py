"""Requests Cloud TPU machines, and writes the script that they start with."""

from collections.abc import Mapping
import dataclasses
import shlex

from dpdist import errors

from . import job as job_lib

TOOL = ("gcloud", "the Google Cloud CLI")

_SECRET_FILE = "/run/dpdist/secret"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(job_lib.Job):
  """A job on the machines of one TPU slice, which determines their number."""

  image: str = job_lib.word(
    "",
    "A container image that has dpdist installed, and the config at its path.",
  )
  accelerator: str = job_lib.word("", "The kind and number of TPUs, as v6e-16.")
  runtime_version: str = job_lib.word(
    "", "The machines' software, as v2-alpha-tpuv6e."
  )
  zone: str = job_lib.word("", "The zone of Google Cloud.")
  project: str = job_lib.word(
    "", "The project of Google Cloud; without it gcloud's."
  )
  nfs: str = job_lib.flag(
    "", "The share to mount at the run directory, as SERVER:/share."
  )
  secret: str = job_lib.word(
    "",
    "The name in Secret Manager of the run's secret; without it the run"
    " makes its own in the run directory.",
  )
  service_account: str = job_lib.word(
    "", "The machines' account; without it the project's."
  )
  spot: bool = job_lib.flag(
    False, "Whether the slice is cheaper but may be preempted."
  )
  python: str = job_lib.flag("python", "The interpreter on the machines.")

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ("image", "accelerator", "runtime_version", "zone", "nfs"):
      if not getattr(self, name):
        raise errors.ArgumentError(f"{name} must be given with --to=tpu-vm")
    if self.nodes != 1:
      raise errors.ArgumentError(
        "nodes must not be given with --to=tpu-vm: the accelerator says how"
        f" many there are, got {self.nodes}"
      )


def files(job: Job) -> Mapping[str, str]:
  """Returns the start-up script, by its file name."""
  return {f"{job.name}.startup.sh": _script(job)}


def command(job: Job, folder: str) -> list[str]:
  """Returns the command that submits the files in a folder."""
  words = ["gcloud", "compute", "tpus", "queued-resources", "create", job.name]
  words += [
    f"--node-id={job.name}",
    f"--accelerator-type={job.accelerator}",
    f"--runtime-version={job.runtime_version}",
    f"--zone={job.zone}",
    f"--metadata-from-file=startup-script={folder}/{job.name}.startup.sh",
    "--scopes=cloud-platform",
  ]
  if job.project:
    words.append(f"--project={job.project}")
  if job.service_account:
    words.append(f"--service-account={job.service_account}")
  if job.spot:
    words.append("--spot")
  return words


def _script(job: Job) -> str:
  workdir = shlex.quote(job.workdir)
  secret_file = _SECRET_FILE if job.secret else ""
  registry = job.image.partition("/")[0]
  docker = [
    *("docker", "run", "--rm", "--privileged", "--network=host"),
    *("--stop-timeout=30", f"--name={job.name}"),
    f"--mount=type=bind,source={job.workdir},target={job.workdir}",
  ]
  steps = [
    f"mkdir -p {workdir}",
    f"mountpoint -q {workdir} ||"
    f" mount -t nfs -o hard {shlex.quote(job.nfs)} {workdir} || exit 1",
  ]
  if job.secret:
    docker.append(
      "--mount=type=bind,source=/run/dpdist,target=/run/dpdist,readonly"
    )
    steps += [
      "(umask 077; mkdir -p /run/dpdist &&"
      " gcloud secrets versions access latest"
      f" --secret={job.secret} --out-file={_SECRET_FILE}) || exit 1",
    ]
  if registry.endswith(".pkg.dev"):
    steps.append(f"gcloud auth configure-docker {registry} --quiet")
  run = shlex.join([*docker, job.image, *job.train(job.python, secret_file)])
  return f"""\
#!/bin/bash
# Runs on every machine of the slice, each time that it starts.
{chr(10).join(steps)}

stopping=
child=
trap 'stopping=1; [ -z "$child" ] || kill -TERM "$child"' TERM

failures=0
while [ -z "$stopping" ]; do
  {run} &
  child=$!
  wait "$child"
  status=$?
  # A signal ends the wait, but not the process.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  case $status in
    0 | 2) exit "$status" ;;
    75) ;;
    *)
      failures=$((failures + 1))
      [ "$failures" -le {job.max_restarts} ] || exit "$status"
      ;;
  esac
  [ -n "$stopping" ] || sleep "${{RESTART_SECONDS:-10}}"
done
exit 75
"""

"""Writes a Ray job: `launch.engines.ray_driver`, with one process a node."""

from collections.abc import Mapping
import dataclasses

import yaml

from dpdist import errors

from . import job as job_lib

TOOL = ("ray", "Ray (pip install 'ray[default]')")

_SAVE_SECONDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(job_lib.Job):
  """A job under Ray."""

  address: str = job_lib.word(
    "", "The dashboard, as http://HOST:8265; without it RAY_ADDRESS."
  )
  directory: str = job_lib.flag(
    ".", "The checkout, which Ray sends to the nodes."
  )
  cpus: int = job_lib.count(1, "Processors of a process.")
  gpus: int = job_lib.count(0, "GPUs of a process.", at_least=0)
  python: str = job_lib.flag("python", "The interpreter on the machines.")

  def __post_init__(self) -> None:
    super().__post_init__()
    # Ray would take anything else for a cluster's own port, and wait for it.
    if self.address and not self.address.startswith(("http://", "https://")):
      raise errors.ArgumentError(
        f"address must begin with http:// or https://, got {self.address!r}"
      )


def files(job: Job) -> Mapping[str, str]:
  """Returns the runtime environment, by its file name."""
  environment = {
    "working_dir": job.directory,
    "excludes": [".git", "tests"],
    "env_vars": {
      # Lines appear when they are printed.
      "PYTHONUNBUFFERED": "1",
      # `ray job stop` would kill the driver after three seconds.
      "RAY_JOB_STOP_WAIT_TIME_S": str(_SAVE_SECONDS),
    },
  }
  return {f"{job.name}.runtime_env.yaml": yaml.safe_dump(environment)}


def command(job: Job, folder: str) -> list[str]:
  """Returns the command that submits the files in a folder."""
  address = [f"--address={job.address}"] if job.address else []
  driver = [
    *(job.python, "-m", "launch.engines.ray_driver"),
    f"--nodes={job.nodes}",
    f"--cpus={job.cpus}",
    f"--gpus={job.gpus}",
    f"--max_restarts={job.max_restarts}",
    "--",
    *job.train(job.python)[4:],
  ]
  # Ray joins the words of the entry point by itself.
  return [
    *("ray", "job", "submit", *address),
    f"--runtime-env={folder}/{job.name}.runtime_env.yaml",
    f'--metadata-json={{"name": "{job.name}"}}',
    "--",
    *driver,
  ]

r"""Writes a job for an engine that has many machines, and submits it.

  python -m launch.submit --to=slurm --nodes=2 --dry_run \
    --config=configs/digits.py --workdir=/shared/digits

--to is slurm, jobset, tpu-vm or ray; docs/engines/ has a page for each. With
--dry_run the files are printed, and the command that would submit them; --out
names a folder to keep them in. The config is loaded and its plan made first, so
that a wrong config is refused here.

Exit codes: 0 done; 2 wrong usage; anything else is a failure.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpdist import config as config_lib
from dpdist import registry
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import statement
from launch.cli import exit_codes
from launch.cli import flag_parsing
from launch.engines import job as job_lib
from launch.engines import jobset
from launch.engines import ray
from launch.engines import slurm
from launch.engines import tpu_vm

for _name, _engine in (
  ("slurm", slurm),
  ("jobset", jobset),
  ("tpu-vm", tpu_vm),
  ("ray", ray),
):
  registry.register("engine", _name)(_engine)
_ENGINES: dict[str, Any] = {
  name: registry.resolve("engine", name, setting="--to")
  for name in registry.names("engine")
}

_TO = flags.DEFINE_enum("to", None, list(_ENGINES), "The engine.")
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file in configs/, at the same path on the machines."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Submit nothing.")
_OUT = flags.DEFINE_string("out", None, "A folder that keeps the files.")

# Fields of the engines' jobs; each engine has some of them.
_HELP = {
  "name": "Of the job.",
  "workdir": "Directory of the run, absolute, seen by all machines.",
  "nodes": "Machines.",
  "max_restarts": "After failures; a stop that saved is not counted.",
  "processes_per_node": "slurm: processes of a node.",
  "cpus": "Processors of a process.",
  "gpus": "GPUs of a process.",
  "memory": "slurm, jobset: of a node, 16G or 16Gi.",
  "time_limit": "slurm: minutes.",
  "partition": "slurm: the partition.",
  "account": "slurm: who pays.",
  "python": "The interpreter on the machines.",
  "image": "jobset, tpu-vm: a container image with dpdist in it.",
  "namespace": "jobset: of all objects.",
  "service_account": "jobset, tpu-vm: one that exists.",
  "secret": "jobset, tpu-vm: the secret that holds the run's.",
  "claim": "jobset: a volume claim that exists.",
  "storage": "jobset: the size of a claim that is made.",
  "storage_class": "jobset: of a claim that is made.",
  "accelerator": "jobset, tpu-vm: the kind of TPU.",
  "topology": "jobset: of TPUs, 4x4.",
  "chips_per_node": "jobset: TPU chips of a pod.",
  "runtime_version": "tpu-vm: of the machines.",
  "zone": "tpu-vm: of Google Cloud.",
  "project": "tpu-vm: of Google Cloud.",
  "nfs": "tpu-vm: SERVER:/share for the directory.",
  "spot": "tpu-vm: may be taken away.",
  "address": "ray: http://HOST:8265.",
  "directory": "ray: the checkout that is sent to the nodes.",
}


def _fields() -> dict[str, dataclasses.Field[Any]]:
  """Returns the fields of all engines' jobs that are flags, by name."""
  return {
    field.name: field
    for engine in _ENGINES.values()
    for field in dataclasses.fields(engine.Job)
    if field.default is not dataclasses.MISSING
  }


flags.DEFINE_string("name", "dpdist", _HELP["name"])
flags.DEFINE_string("workdir", None, _HELP["workdir"])
for _name, _field in sorted(_fields().items()):
  _define: Any = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    str: flags.DEFINE_string,
  }[type(_field.default)]
  _define(_name, None, _HELP.get(_name, _field.metadata.get("help", "")))
flags.mark_flags_as_required(["to", "config", "workdir"])


def main(argv: Sequence[str]) -> int:
  """Returns an exit code."""
  del argv
  engine = _ENGINES[str(_TO.value)]
  try:
    if _OUT.value == "":
      raise ValueError("--out must be a folder, got ''")
    job = _job(engine)
    files = engine.files(job)
    plan = plan_lib.make_plan(config_lib.privacy_config(_CONFIG.value))
  except ValueError as error:
    return flag_parsing.usage_error(error)
  print(
    f"will spend epsilon {statement.rounded_up(plan.epsilon(), 4)} at delta"
    f" {plan.delta:g} ({plan.accountant} accountant)",
    file=sys.stderr,
  )
  try:
    if _DRY_RUN.value and _OUT.value is None:
      for name, text in files.items():
        print(f"# {name}\n{text}")
      print(f"# submitted by: {shlex.join(engine.command(job, '.'))}")
      return exit_codes.DONE
    if _OUT.value is not None:
      return _submit(engine, job, files, _OUT.value)
    with tempfile.TemporaryDirectory() as folder:
      return _submit(engine, job, files, folder)
  except OSError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1


def _job(engine: Any) -> Any:
  """Makes the engine's job from the flags that were given.

  Raises:
    JobError: a flag does not fit the engine, or its value cannot be used.
  """
  fields = {field.name for field in dataclasses.fields(engine.Job)}
  given = {}
  for name in ("name", "workdir", *_fields()):
    if flags.FLAGS[name].value is None:
      continue
    if name not in fields:
      raise job_lib.JobError(f"--{name} does not go with --to={_TO.value}")
    given[name] = flags.FLAGS[name].value
  if "secret" in given and _CONFIG.value.secret_file:
    raise job_lib.JobError(
      "config.secret_file must be empty where --secret is given, got"
      f" {_CONFIG.value.secret_file!r}"
    )
  return engine.Job(arguments=tuple(_settings()), **given)


def _settings() -> list[str]:
  """Returns the config and its changes, as arguments of launch.train."""
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  changes = config_flags.get_override_values(flags.FLAGS["config"])
  return [
    f"--config={path}",
    *(f"--config.{name}={value}" for name, value in changes.items()),
  ]


def _submit(engine: Any, job: Any, files: Any, folder: str) -> int:
  os.makedirs(folder, exist_ok=True)
  for name, text in files.items():
    pathlib.Path(folder, name).write_text(text)
  words = engine.command(job, folder)
  if _DRY_RUN.value:
    print(shlex.join(words))
    return exit_codes.DONE
  tool, what = engine.TOOL
  if shutil.which(tool) is None:
    return flag_parsing.usage_error(
      f"{tool} is missing: install {what}, or write the files with --dry_run"
      " --out=FOLDER"
    )
  code = subprocess.run(words, check=False).returncode
  if code:
    print(f"error: {tool} exited with {code}", file=sys.stderr)
    return 1
  return exit_codes.DONE


if __name__ == "__main__":
  flag_parsing.run(main)

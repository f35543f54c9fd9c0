r"""Writes a job for an engine that has many machines, and submits it.

  python -m launch.submit --to=slurm --nodes=2 --dry_run \
    --config=configs/digits.py --workdir=/shared/digits

--to is slurm, jobset, tpu-vm or ray; docs/engines/ has a page for each. With
--dry_run the files are printed, and the command that would submit them; --out
names a folder to keep them in. The config is loaded and its plan made first, so
that a wrong config is refused here.

Exit codes: 0 done; 2 wrong usage; anything else is a failure.
"""

from collections.abc import Mapping
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
from dpdist import errors
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import statement

from .cli import common_flags
from .cli import exit_codes
from .cli import flag_parsing
from .engines import engines
from .engines import job as job_lib

_ENGINES = engines.load()
_FLAGS = engines.flags(_ENGINES)

_TO = flags.DEFINE_enum(
  "to", None, list(_ENGINES), "The engine.", required=True
)
_CONFIG = common_flags.config(
  "A file in configs/, at the same path on the machines."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Submit nothing.")
_OUT = flags.DEFINE_string("out", None, "A folder that keeps the files.")

for _name, _flag in _FLAGS.items():
  _define: Any = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    str: flags.DEFINE_string,
  }[_flag.kind]
  # None: a flag that is not given keeps the engine's default.
  _define(_name, None, _flag.text(_ENGINES))
flags.mark_flag_as_required("workdir")


def main() -> int:
  """Returns an exit code."""
  engine = _ENGINES[_TO.value]
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


def _job(engine: job_lib.Engine) -> Any:
  """Makes the engine's job from the flags that were given."""
  given = {
    name: flags.FLAGS[name].value
    for name in _FLAGS
    if flags.FLAGS[name].value is not None
  }
  for name in given:
    if _TO.value not in _FLAGS[name].help:
      raise errors.ArgumentError(f"--{name} does not go with --to={_TO.value}")
  if "secret" in given and _CONFIG.value.secret_file:
    raise errors.ArgumentError(
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


def _submit(
  engine: job_lib.Engine, job: Any, files: Mapping[str, str], folder: str
) -> int:
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

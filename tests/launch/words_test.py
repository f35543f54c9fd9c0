"""The commands by name, in a checkout and where dpdist is installed."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

import dpdist
from dpdist import errors
from launch.cli import config_files
from launch.cli import words
from tests.support import commands

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _main(monkeypatch, *args):
  monkeypatch.setattr(sys, "argv", ["dpdist", *args])
  return words.main()


@pytest.fixture(name="installed", scope="module")
def fixture_installed(tmp_path_factory):
  """A folder whose dpdist is as in a wheel: launch and configs inside."""
  folder = tmp_path_factory.mktemp("installed")
  package = folder / "dpdist"
  package.mkdir()
  for path in (_ROOT / "dpdist").iterdir():
    (package / path.name).symlink_to(path)
  for name in ("launch", "configs"):
    (package / name).symlink_to(_ROOT / name)
  # A package of that name which is somebody else's.
  (folder / "launch").mkdir()
  (folder / "launch" / "__init__.py").write_text("raise ImportError")
  return folder


def _python(folder, *args):
  return subprocess.run(
    [sys.executable, *args], cwd=folder, capture_output=True, text=True
  )


def test_every_program_is_a_command():
  folder = _ROOT / "launch"
  programs = {x.stem for x in folder.glob("*.py")} - {"__init__"}
  packages = {x.parent.name for x in folder.glob("*/__main__.py")}
  assert sorted(words.COMMANDS) == sorted(programs | packages)


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",), ("help",)])
def test_help_has_a_line_for_each_command(args, monkeypatch, capsys):
  assert _main(monkeypatch, *args) == 0
  lines = capsys.readouterr().out.splitlines()
  for name in words.COMMANDS:
    (line,) = (line for line in lines if line.startswith(f"  {name} "))
    assert 20 < len(line) <= 80, line


def test_the_version_is_told(monkeypatch, capsys):
  assert _main(monkeypatch, "--version") == 0
  assert capsys.readouterr().out == f"dpdist {dpdist.__version__}\n"


@pytest.mark.parametrize(
  ("name", "nearest"),
  [("trian", "train"), ("budgets", "budget"), ("??", "--help")],
)
def test_an_unknown_command_suggests_one(name, nearest, monkeypatch, capsys):
  assert _main(monkeypatch, name) == 2
  assert capsys.readouterr().err.splitlines() == [
    f"error: there is no command {name!r}",
    f"try: dpdist {nearest}",
  ]


def test_a_command_is_run_with_its_flags_and_ends_with_its_code(tmp_path):
  run = f"--workdir={tmp_path / 'none'}"
  done = _python(_ROOT, "-m", "dpdist", "verify", run)
  assert done.returncode == 2
  # Where this checkout is installed for development, both names are there.
  is_installed = importlib.util.find_spec("dpdist.launch") is not None
  verify = "dpdist verify" if is_installed else "python -m launch.verify"
  assert done.stderr.splitlines()[-1] == (
    f"try: {verify} {run} --ledger=WHERE_THE_LEDGER_IS"
  )


def test_an_installed_command_names_what_there_is(installed, tmp_path):
  run = f"--workdir={tmp_path / 'none'}"
  done = _python(installed, "-m", "dpdist", "verify", run)
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == (
    f"try: dpdist verify {run} --ledger=WHERE_THE_LEDGER_IS"
  )


_OF_JOBS = """
from dpdist.launch.cli import config_files, words
from dpdist.launch.engines import job, ray, ray_driver
print(job.Job(arguments=(), workdir="/w").train("python")[3])
print(ray.command(ray.Job(arguments=(), workdir="/w"), "."))
print(ray_driver._TRAIN, words.module("train"))
print(words.shown("dpdist fetch --name=x"), words.shown("pip install y"))
print(config_files.names()[:3], config_files.given(
  config_files.found(["--config=digits"])[0].partition("=")[2]))
"""


def test_installed_jobs_run_what_is_installed(installed):
  done = _python(installed, "-c", _OF_JOBS)
  assert done.returncode == 0, done.stderr
  train, submitted, *rest = done.stdout.splitlines()
  assert train == "dpdist.launch.train"
  assert "dpdist.launch.engines.ray_driver" in submitted
  assert rest == [
    "dpdist.launch.train dpdist.launch.train",
    "dpdist fetch --name=x pip install y",
    "['adult', 'chitchat_users', 'cifar10_scattering'] digits",
  ]


# Configs that come with dpdist, by name.

_DIGITS = f"{_ROOT}/configs/digits.py"


@pytest.mark.parametrize(
  ("given", "found"),
  [
    (["--config=digits"], [f"--config={_DIGITS}"]),
    (["-config=digits:a:b"], [f"-config={_DIGITS}:a:b"]),
    (["--config", "digits"], ["--config", _DIGITS]),
    (["--config=configs/digits.py"], ["--config=configs/digits.py"]),
    (["--config=digits.py", "--config"], ["--config=digits.py", "--config"]),
    (["--config.task=digits", "x"], ["--config.task=digits", "x"]),
    (["--config=", "--", "--config=x"], ["--config=", "--", "--config=x"]),
  ],
)
def test_a_config_is_found_by_its_name(given, found):
  assert config_files.found(given) == found


def test_a_folder_is_its_config_and_other_files_are_refused(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "digits").mkdir()  # A run's, say.
  assert config_files.found(["--config=digits"]) == [f"--config={_DIGITS}"]
  (tmp_path / "digits" / "config.py").touch()
  assert config_files.found(["--config=digits"]) == [
    "--config=digits/config.py"
  ]
  # Or it would be run as a program.
  (tmp_path / "people.csv").touch()
  with pytest.raises(errors.ArgumentError, match=r"ends in \.py, got 'people"):
    config_files.found(["--config=people.csv"])


def test_an_unknown_name_gets_the_nearest(monkeypatch):
  with pytest.raises(errors.ArgumentError, match=r"'__init__', none of adult,"):
    config_files.found(["--config=__init__"])
  done = commands.run("budget", "--config=digit")
  assert done.code == 2
  assert "got 'digit'; did you mean digits?" in done.err


def test_a_job_is_told_the_name():
  """Since the folder may be another one on its machines."""
  assert config_files.given(f"{_DIGITS}:a") == "digits:a"
  assert config_files.given("configs/digits.py") == "configs/digits.py"
  assert config_files.given("/tmp/digits.py") == "/tmp/digits.py"


def test_a_command_takes_a_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  done = commands.run(
    *("budget", "--config=digits", "--config.privacy.accountant=rdp"),
    *("--config.privacy.target_epsilon=None", "--config.privacy.num_steps=2"),
    "--config.privacy.noise_multiplier=9",
  )
  assert done.code == 0, done.err
  assert "1438" in done.out
  done = commands.run("budget", "--config=digits/gone.py")
  assert done.err.splitlines()[-1] == f"try: ls {_ROOT}/configs"

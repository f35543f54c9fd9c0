"""Help and wrong usage are answered before jax is imported, in each command.

Times are in `tests/benchmarks/startup.py`: here it is what was imported.
"""

import json
import pathlib
import subprocess
import sys

import pytest

from launch.cli import settings
from tests.support import without_jax

_ROOT = pathlib.Path(__file__).parents[2]
_COMMANDS = sorted(
  path.stem
  for path in (_ROOT / "launch").glob("*.py")
  if '__name__ == "__main__"' in path.read_text()
)
_HEAVY = (
  *("dp_accounting", "flax", "grain", "jax", "jaxlib", "matplotlib", "optax"),
  *("orbax", "scipy", "sklearn", "tensorboardX", "tensorstore"),
)
_DIGITS = f"--config={_ROOT}/configs/digits.py"

# Each command line is run in a child of its own, which nothing was imported in
# but what all commands import.
_ASK = """
import contextlib, io, json, os, runpy, sys
import launch.cli.flag_parsing
for command, *args in json.loads(sys.argv[1]):
  if not os.fork():
    sys.argv = [f"launch/{command}.py", *args]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      try:
        runpy.run_module(f"launch.{command}", run_name="__main__",
                         alter_sys=True)
      except SystemExit as ended:
        code = ended.code
    heavy = [x for x in json.loads(sys.argv_heavy) if x in sys.modules]
    print(json.dumps([code, heavy, out.getvalue(), err.getvalue()]), flush=True)
    os._exit(0)
  os.wait()
"""


@pytest.fixture(scope="module")
def answers():
  asked = [
    *([name, "--help"] for name in _COMMANDS),
    *([name, "--nothing=1"] for name in _COMMANDS),
    ["train", _DIGITS, "--workdir=w", "--config.privacy.num_stpes=1"],
    ["train", _DIGITS, "--workdir=w", "--config.privacy.num_steps=x"],
    ["train", "--settings"],
    ["check", "--helpfull"],
  ]
  code = _ASK.replace("sys.argv_heavy", repr(json.dumps(_HEAVY)))
  done = subprocess.run(
    [sys.executable, "-c", code, json.dumps(asked)],
    capture_output=True,
    text=True,
    cwd=_ROOT,
    timeout=300,
    check=True,
  )
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  return {
    tuple(key): row for key, row in zip(map(tuple, asked), rows, strict=True)
  }


def test_nothing_heavy_is_imported_to_answer(answers):
  for asked, (_, heavy, _, _) in answers.items():
    assert not heavy, asked


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_lists_the_commands_own_flags_and_exits_with_0(name, answers):
  code, _, out, err = answers[name, "--help"]
  assert (code, err) == (0, "")
  text = (_ROOT / "launch" / f"{name}.py").read_text()
  assert out.split("\n")[0] in text
  assert "\nFlags:\n  --" in out
  for flag in ("json", "config", "workdir"):
    if f"_{flag.upper()} = common_flags.{flag}(" in text:
      assert f"{flag}=VALUE\n" in out or f"--[no]{flag}\n" in out
  assert ("--settings" in out) == ("common_flags.c" in text)
  assert "logtostderr" not in out
  assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", _COMMANDS)
def test_a_flag_that_there_is_not_exits_with_2(name, answers):
  code, _, out, err = answers[name, "--nothing=1"]
  assert (code, out) == (2, "")
  assert err.startswith("error: there is no flag --nothing")


def test_a_wrong_setting_exits_with_2_and_says_which_is_meant(answers):
  code, _, _, err = answers[
    "train", _DIGITS, "--workdir=w", "--config.privacy.num_stpes=1"
  ]
  assert code == 2
  assert "did you mean config.privacy.num_steps?" in err
  code, _, _, err = answers[
    "train", _DIGITS, "--workdir=w", "--config.privacy.num_steps=x"
  ]
  assert code == 2
  assert "config.privacy.num_steps must be an integer, got 'x'" in err


def test_a_run_speaks_before_jax_is_imported():
  code = (
    "import runpy, sys\nsys.argv[0] = 'launch/train.py'\n"
    "runpy.run_module('launch.train', run_name='__main__')"
  )
  done = without_jax.run(code, _DIGITS, "--workdir=w")
  assert done.stdout == "starting\n"
  assert "No module named 'jax'" in done.stderr


def test_settings_are_listed(answers):
  code, _, out, _ = answers["train", "--settings"]
  assert (code, out) == (0, settings.reference())
  assert "privacy.target_epsilon  (None or float, None)" in out
  code, _, out, _ = answers["check", "--helpfull"]
  assert code == 0
  assert settings.reference() in out
  assert "--verbosity" in out


def test_the_page_of_settings_is_that_of_the_config():
  page = (_ROOT / "docs" / "settings.md").read_text()
  assert page == settings.page(), "write it as it says at its top"

"""Every bash block of README.md and the docs is a command that there is.

Each `dpdist NAME` and `python -m launch.NAME` is parsed with its flags and its
config, and what only plans is run. Blocks that need what no test has stand
after a comment, `<!-- needs: a cluster -->` or `<!-- needs: a cloud -->`; what
they say of this project is held to be so all the same.
"""

import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

from absl import app
import pytest

from launch.cli import words as words_lib
from launch.compare import command as compare
from launch.init import project
from tests.support import commands

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PAGES = (
  *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
  *sorted(str(x.relative_to(_ROOT)) for x in _ROOT.glob("docs/**/*.md")),
)
# The paragraph before the mark, the mark, and the block.
_BLOCK = re.compile(
  r"(?:(?P<before>[^\n]+)\n\n)?(?:<!-- (?P<mark>[^\n]+) -->\n)?"
  r"```bash\n(?P<text>.*?)\n```",
  re.DOTALL,
)
_NEEDS = ("needs: a cluster", "needs: a cloud")
# Programs that a block may name without a mark.
_OURS = ("mkdocs", "mypy", "ruff")


def _blocks():
  for page in _PAGES:
    for match in _BLOCK.finditer((_ROOT / page).read_text()):
      yield page, match["before"] or "", match["mark"] or "", match["text"]


def _commands(text):
  """The words of each simple command, and those of others as they come."""
  text = re.sub(r"(?m)(^|\s)#.*$", "", text)
  text = re.sub(r"\\\n\s*", " ", text).replace("\n", " ; ")
  lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
  lexer.whitespace_split = True
  words = []
  for word in lexer:
    if set(word) <= set("();&|"):
      if words:
        yield words
      words = []
    else:
      words.append(word)
  if words:
    yield words


# Commands that take words in place of flags.
_WITHOUT_FLAGS = {"compare": compare, "init": project}


def _python(words):
  """The module that a command runs, and its arguments; None if it runs none."""
  if "dpdist" in words:
    at = words.index("dpdist")
    assert words[at + 1] in words_lib.COMMANDS, words
    return f"launch.{words[at + 1]}", words[at + 2 :]
  if "python" not in words:
    return None
  at = words.index("python")
  assert words[at + 1] == "-m", words
  return words[at + 2], words[at + 3 :]


def _parse(monkeypatch, name, arguments):
  """Parses a command line as the command itself does, and does no more."""

  def only_parse(main, flags_parser):
    del main
    flags_parser(sys.argv)
    sys.exit(0)

  with monkeypatch.context() as patched:
    patched.setattr(app, "run", only_parse)
    return commands.run(name, *arguments)


def _check_launch(monkeypatch, name, arguments):
  if name in _WITHOUT_FLAGS:
    assert _WITHOUT_FLAGS[name].parser().parse_args(arguments)
    return
  if name == "submit":
    done = commands.run(name, *arguments, "--dry_run")
  else:
    done = _parse(monkeypatch, name, arguments)
  assert done.code == 0, done.err
  if name in ("local", "engines.ray_driver"):
    passed = arguments[arguments.index("--") + 1 :]
    if not any(word.startswith("--workdir") for word in passed):
      passed = [*passed, "--workdir=/tmp/x"]
    _check_launch(monkeypatch, "train", passed)


def _check_program(name, arguments):
  """One of tests/ or dpdist/: it is there and has the flags."""
  spec = importlib.util.find_spec(name)
  assert spec is not None, name
  source = pathlib.Path(spec.origin).read_text()
  for word in arguments:
    flag = re.match(r"--(\w+)", word)
    assert flag is not None, word
    assert f'"--{flag[1]}"' in source, (name, word)


def _check_pytest(arguments):
  settings = tomllib.loads((_ROOT / "pyproject.toml").read_text())
  markers = settings["tool"]["pytest"]["ini_options"]["markers"]
  known = {marker.partition(":")[0] for marker in markers}
  if "-m" in arguments:
    chosen = arguments[arguments.index("-m") + 1]
    assert {*re.findall(r"\w+", chosen)} <= {*known, "or", "and", "not"}


def _check_install(arguments):
  """The extras that are installed are there."""
  settings = tomllib.loads((_ROOT / "pyproject.toml").read_text())
  extras = settings["project"]["optional-dependencies"]
  assert arguments[:2] == ["install", "-e"], arguments
  found = re.fullmatch(r"\.\[([\w,]+)\]", arguments[2])
  assert found is not None, arguments
  assert {*found[1].split(",")} <= {*extras}, arguments


def _check(monkeypatch, text, is_marked):
  syntax = subprocess.run(
    ["bash", "-n"], input=text, capture_output=True, text=True, check=False
  )
  assert syntax.returncode == 0, syntax.stderr
  for words in _commands(text):
    python = _python(words)
    if python is None:
      if words[0] == "pip":
        _check_install(words[1:])
      else:
        assert is_marked or words[0] in _OURS, words
    elif python[0].startswith("launch."):
      name = python[0].removeprefix("launch.")
      _check_launch(monkeypatch, name, python[1])
    elif python[0] == "pytest":
      _check_pytest(python[1])
    else:
      _check_program(*python)


def _named():
  for page, before, mark, text in _blocks():
    name = f"{page}: {text.splitlines()[0][:50]}"
    yield pytest.param(before, mark, text, id=name)


@pytest.mark.parametrize(("before", "mark", "text"), list(_named()))
def test_a_block_is_of_commands_that_there_are(before, mark, text, monkeypatch):
  monkeypatch.chdir(_ROOT)
  if mark.startswith("needs:"):
    assert mark in _NEEDS
    assert mark.split()[-1] in before, "the sentence before says so"
  _check(monkeypatch, text, mark in _NEEDS)


def _plans():
  """Command lines of launch.budget that read a config alone."""
  for page, _, _, text in _blocks():
    for words in _commands(text):
      python = _python(words)
      if python is None or python[0] != "launch.budget":
        continue
      if any(word.startswith("--config=") for word in python[1]):
        yield pytest.param(python[1], id=f"{page}: {' '.join(python[1])}")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", list(_plans()))
def test_what_only_plans_runs(arguments, monkeypatch, tmp_path):
  """By the quicker accountant."""
  monkeypatch.chdir(_ROOT)
  here = [word.replace("/tmp/", f"{tmp_path}/") for word in arguments]
  done = commands.run("budget", *here, "--config.privacy.accountant=rdp")
  assert done.code == 0, done.err
  assert "epsilon" in done.out


def test_planning_prints_what_the_page_shows(monkeypatch):
  monkeypatch.chdir(_ROOT)
  page = (_ROOT / "docs/planning.md").read_text()
  (shown,) = re.findall(r"(?ms)^```\n( +noise .*?)\n```$", page)
  done = commands.run(
    "budget",
    "--config=configs/digits.py",
    "--target_epsilon=3",
    "--config.privacy.accountant=rdp",
  )
  assert shown in done.out


@pytest.mark.slow
def test_the_page_on_tuning_shows_rows_of_its_table(monkeypatch):
  monkeypatch.chdir(_ROOT)
  page = (_ROOT / "docs/tuning.md").read_text()
  shown = re.findall(r"(?m)^ {14,}[\d.]+ .*$", page)
  (text,) = (t for *_, t in _blocks() if "--table" in t and "wrn" in t)
  ((_, arguments),) = map(_python, _commands(text))
  done = commands.run("budget", *arguments)
  assert len(shown) >= 5
  assert [row for row in shown if row not in done.out] == []


@pytest.mark.parametrize(
  "text",
  [
    "python -m launch.train --config=configs/digits.py --workdr=/tmp/x",
    "python -m launch.train --config=configs/gone.py --workdir=/tmp/x",
    "python -m launch.train --config=configs/digits.py --workdir=/tmp/x"
    " --config.privcy=1",
    "python -m launch.local --num_processes=2 -- --config=configs/gone.py",
    "dpdist train --config=gone --workdir=/tmp/x",
    "dpdist trian --config=digits --workdir=/tmp/x",
    "dpdist local --num_processes=2 -- --config=digits --wrkdir=/tmp/x",
    "python -m tests.benchmarks.clipping --gone=1",
    "python -m tests.benchmarks.gone",
    "python -m pytest -m gone",
    "pip install -e '.[gone]'",
    "kubectl get pods",
    "if true",
  ],
)
def test_what_there_is_not_is_found(text, monkeypatch):
  monkeypatch.chdir(_ROOT)
  with pytest.raises((AssertionError, ModuleNotFoundError)):
    _check(monkeypatch, text, False)


def test_a_command_after_a_comment_is_seen():
  assert list(_commands("a # c\nb \\\n  c && d")) == [["a"], ["b", "c"], ["d"]]


def test_every_bash_block_is_seen():
  fences = sum((_ROOT / page).read_text().count("```bash") for page in _PAGES)
  assert len(list(_blocks())) == fences > 40


def test_what_ci_runs_is_where_it_looks():
  marks = lambda page: re.findall(
    r"(?m)^<!-- ci: (\w+) -->\n```bash$", (_ROOT / page).read_text()
  )
  assert marks("README.md") == ["train", "test"]
  assert marks("docs/development.md") == ["cluster", "tpu"]

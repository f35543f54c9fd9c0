"""README.md, docs/ and what they name: tests, files, packages, commands."""

import ast
import functools
import pathlib
import re

import pytest

import dpdist
from launch.cli import words
from tests.mutants import patches

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_NAME = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_PAGES = (
  *_TOP,
  *sorted(str(x.relative_to(_ROOT)) for x in _ROOT.glob("docs/**/*.md")),
)


def _read(page):
  return (_ROOT / page).read_text()


def _missing(text):
  """Tests that a text names and that are not there."""
  return [
    f"{file}::{name}"
    for file, name in _NAME.findall(text)
    if name not in _functions(_ROOT / file)
  ]


@functools.cache
def _functions(path):
  tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
  return {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}


@pytest.mark.parametrize("page", _PAGES)
def test_every_test_that_is_named_is_there(page):
  assert not _missing(_read(page))


def test_one_that_is_not_there_is_found():
  here = "tests/repo/readme_test.py"
  text = f"`{here}::test_gone`, `{here}::test_one_that_is_not_there_is_found`"
  assert _missing(text) == [f"{here}::test_gone"]
  assert _missing("`tests/gone_test.py::test_x`") == [
    "tests/gone_test.py::test_x"
  ]


def test_the_test_index_names_a_test_for_each_promise():
  rows = re.findall(
    r"(?m)^\| (?!promise|---)(.*?) \| (.*) \|$", _read("docs/test_index.md")
  )
  assert len(rows) > 50
  for promise, tests in rows:
    assert _NAME.search(tests), promise


def test_the_ancestors_tests_are_there():
  """Names without a file, and with `*` or `...` for what is left out."""
  all_names = {
    name
    for path in (_ROOT / "tests").rglob("*_test.py")
    for name in _functions(path)
  }
  named = re.findall(r"`(test_[\w.*]+)`", _read("docs/migrating.md"))
  assert len(named) > 20
  for name in named:
    pattern = re.escape(name).replace(r"\*", r"\w*").replace(r"\.\.\.", r"\w*")
    assert any(re.fullmatch(pattern, x) for x in all_names), name
  for bug in re.findall(r"`(bugs/[\w*.]+)`", _read("docs/migrating.md")):
    assert list((_ROOT / "tests" / "mutants").glob(bug)), bug


@pytest.mark.parametrize("page", _PAGES)
def test_every_file_that_is_named_is_there(page):
  for path in re.findall(
    r"`((?:\.ci|configs|docs|dpdist|launch|tests)/[\w/.-]*)", _read(page)
  ):
    assert (_ROOT / path.rstrip(".")).exists(), path


@pytest.mark.parametrize("page", _TOP)
def test_every_link_is_to_a_file(page):
  """Of these pages; `mkdocs build --strict` sees to those in docs/."""
  for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", _read(page)):
    assert (_ROOT / link).is_file(), link


def test_readme_is_short():
  assert len(_read("README.md").splitlines()) <= 250


def test_every_command_is_in_both_tables():
  for page in ("README.md", "docs/cli.md"):
    rows = re.findall(r"(?m)^\| `dpdist (\w+)` \|", _read(page))
    assert sorted(rows) == sorted(words.COMMANDS), page


def test_every_package_is_in_the_architecture():
  text = _read("docs/architecture.md")
  for path in (_ROOT / "dpdist").rglob("__init__.py"):
    package = path.parent.relative_to(_ROOT).as_posix()
    named = package if package != "dpdist" else "dpdist/__init__.py"
    assert f"| `{named}` |" in text, package


def test_the_page_of_the_public_api_has_all_of_it():
  named = re.findall(r"(?m)^        - (\w+)$", _read("docs/api/dpdist.md"))
  assert sorted(named) == [
    name for name in dir(dpdist) if name != "__version__"
  ]


def test_as_many_known_bugs_as_are_stated():
  bugs = len(list(patches.FOLDER.glob("*.patch")))
  text = _read("docs/mutation_gate.md")
  assert f"holds {bugs} patches for {len(patches.KINDS)}\nkinds" in text
  assert f"{bugs} known bugs" in _read("CHANGELOG.md")


@functools.cache
def _messages():
  """All strings of the program, in which NUL stands for each value."""
  found = []
  for folder in ("dpdist", "launch"):
    for path in (_ROOT / folder).rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
          found.append([getattr(x, "value", "") for x in node.values])
        elif isinstance(node, ast.Constant):
          found.append([node.value])
  return "\n".join(
    "".join(part if isinstance(part, str) else "\0" for part in parts)
    for parts in found
  )


def _is_said(line):
  """Whether the program says a line, in which `...` stands for each value."""
  text = re.sub("^(error|WARNING): ", "", line).strip(". ")
  pattern = re.escape(text).replace(re.escape("..."), "\0+")
  return re.search(pattern, _messages()) is not None


def test_troubleshooting_quotes_what_the_program_says():
  blocks = re.findall(
    r"(?ms)^```text\n(.*?)^```$", _read("docs/troubleshooting.md")
  )
  lines = [line for block in blocks for line in block.splitlines()]
  assert len(lines) > 25
  assert [line for line in lines if not _is_said(line)] == []


def test_what_the_program_does_not_say_is_found():
  assert _is_said("error: privacy.unit must be ... with ...")
  assert not _is_said("error: privacy.unit must be ... on Sundays")
  assert not _is_said("error: privacy.unit must with ...")

"""The README names tests as what stands behind a promise: they are there."""

import ast
import functools
import pathlib
import re

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_NAME = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


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


def test_every_test_that_is_named_is_there():
  assert not _missing((_ROOT / "README.md").read_text())


def test_one_that_is_not_there_is_found():
  here = "tests/repo/readme_test.py"
  text = (
    f"`{here}::test_gone`, `{here}::test_every_test_that_is_named_is_there`"
  )
  assert _missing(text) == [f"{here}::test_gone"]
  assert _missing("`tests/gone_test.py::test_x`") == [
    "tests/gone_test.py::test_x"
  ]


def test_the_page_for_auditors_names_a_test_for_each_promise():
  text = (_ROOT / "README.md").read_text()
  _, _, page = text.partition("\n### Which test stands behind what\n")
  rows = re.findall(
    r"(?m)^\| (?!promise|---)(.*?) \| (.*) \|$", page.partition("\n#")[0]
  )
  assert len(rows) > 20
  for promise, tests in rows:
    assert _NAME.search(tests), promise

"""The BUILD files are the import diagram: held against the imports, both ways.

A folder is a package: one `dp_package` of all its modules, with what they
import from other packages as `deps`, no more and no less, wherever in a file
the import stands. Commands and examples are named by `dp_commands` beside it; a
folder of tests is one `dp_tests`. What a test starts as a program is `data`.

Arrows between packages go down only, those between modules in no circle, and
what is private can be seen by those alone that BUILD names. No module, function
or folder is too long to be read at one go.
"""

import ast
from collections.abc import Iterator
import functools
import pathlib
import shutil
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("dpdist", "launch", "configs", "tests")

# Lowest first. A package imports from lower rows only, never from its own.
LAYERS = (
  ("dpdist:base",),
  ("dpdist/assets", "dpdist/distributed", "dpdist/files", "dpdist/keys")
  + ("dpdist/sums",),
  ("dpdist/clipping/trace",),
  ("dpdist/clipping/layers",),
  ("dpdist/clipping/engines",),
  ("dpdist/accounting", "dpdist/clipping", "dpdist/noise", "dpdist/sampling"),
  ("dpdist/data", "dpdist/frameworks", "dpdist/models", "dpdist/privacy"),
  ("dpdist/data/builders", "dpdist/data/features", "dpdist/mechanism")
  + ("dpdist/reporting", "dpdist:config"),
  ("dpdist/data:api", "dpdist/data/datasets", "dpdist/ledger")
  + ("dpdist/sensitivity", "dpdist/tasks/scoring"),
  ("dpdist/tasks",),
  ("dpdist/workdir",),
  ("dpdist/frontends", "dpdist/training"),
  (
    *("dpdist/export", "dpdist/frontends/keras", "dpdist/own_loop"),
    "dpdist/profiling",
  ),
  ("dpdist/audit",),
  ("dpdist",),
  ("dpdist/examples",),
  ("configs",),
  ("launch/cli",),
  ("launch/compare", "launch/engines", "launch/init"),
  ("launch",),
)
STRANGERS = ("accounting", "clipping", "noise", "sampling")

# What is read at one go: lines of a module and of a function, its docstring
# included, and modules of a folder.
LINES_OF_A_MODULE, LINES_OF_A_FUNCTION, MODULES_OF_A_FOLDER = 450, 80, 12

# What must answer on a machine without an accelerator's stack: modules.
WITHOUT_JAX = (
  "dpdist/accounting/calibration",
  "dpdist/audit/bounds",
  "dpdist/config",
  "dpdist/frontends/dp_config",
  "dpdist/keys/keys",
  "dpdist/ledger/budgets",
  "dpdist/ledger/data_budget",
  "dpdist/ledger/ledger",
  "dpdist/privacy/composition",
  "dpdist/privacy/plan",
  "dpdist/sampling",
  "dpdist/workdir/verify",
  "launch/budget",
  "launch/engines/ray_driver",
  "launch/local",
  "launch/submit",
  "launch/verify",
)
ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax", "grain"}


# What the rules add to every folder's deps.
OF_ALL = ("dpdist:base",)
OF_ALL_TESTS = (*OF_ALL, "tests:conftest", "tests/support:support")


class Target(NamedTuple):
  """One target of a BUILD file; labels are whole: `dpdist/keys:keys`."""

  rule: str
  label: str
  srcs: tuple[str, ...]
  deps: tuple[str, ...]
  data: tuple[str, ...]
  visibility: tuple[str, ...]


def whole(label: str, folder: str) -> str:
  """`dpdist/keys:keys` for `//dpdist/keys`, and in that folder for `:keys`."""
  if not label.startswith("//"):
    return f"{folder}:{label.removeprefix(':')}"
  package, _, name = label[2:].partition(":")
  return f"{package}:{name or package.rpartition('/')[2]}"


def short(label: str) -> str:
  """`dpdist/keys` for `dpdist/keys:keys`."""
  package, _, name = label.partition(":")
  return package if package.rpartition("/")[2] == name else label


def read_targets(root: pathlib.Path) -> list[Target]:
  """All targets of all BUILD files."""
  builds = [path for top in FOLDERS for path in (root / top).rglob("BUILD")]
  return [
    target for path in sorted(builds) for target in _read_build(root, path)
  ]


def _read_build(root: pathlib.Path, path: pathlib.Path) -> Iterator[Target]:
  folder = path.parent.relative_to(root).as_posix()
  own = whole(f"//{folder}", "")
  all_srcs = tuple(
    f"{folder}/{module.name}" for module in sorted(path.parent.glob("*.py"))
  )
  default: tuple[str, ...] = ("//visibility:private",)
  for statement in ast.parse(path.read_text()).body:
    call = getattr(statement, "value", None)
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
      continue
    rule = call.func.id
    given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    labels = lambda key, given=given: tuple(
      whole(label, folder) for label in given.get(key, ())
    )
    if rule == "package":
      default = tuple(given["default_visibility"])
    elif rule == "dp_commands":
      for name in given["names"]:
        srcs = (f"{folder}/{name}.py",)
        seen_by = ("//visibility:public",)
        yield Target(rule, f"{folder}:{name}", srcs, (own,), (), seen_by)
    elif rule == "dp_package":
      visibility = tuple(given.get("visibility", ["//visibility:public"]))
      deps = (*labels("deps"), *OF_ALL)
      yield Target(rule, own, all_srcs, deps, (), visibility)
    elif rule == "dp_tests":
      deps = (*labels("deps"), *OF_ALL_TESTS)
      visibility = ("//tests:__subpackages__",)
      yield Target(rule, own, all_srcs, deps, labels("data"), visibility)
    elif rule == "py_library":
      srcs = tuple(f"{folder}/{src}" for src in given["srcs"])
      label = whole(f":{given['name']}", folder)
      yield Target(rule, label, srcs, labels("deps"), (), default)


def read_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Every Python file below the four folders, by its slashed module name."""
  files = {}
  for folder in FOLDERS:
    for path in sorted((root / folder).rglob("*.py")):
      name = path.relative_to(root).with_suffix("").as_posix()
      files[name.removesuffix("/__init__")] = path
  return files


@functools.cache
def _import_statements(
  text: str, *, at_run_time: bool
) -> list[ast.Import | ast.ImportFrom]:
  tree = ast.parse(text)
  if at_run_time:
    for node in ast.walk(tree):
      if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        node.body = []
  kinds = (ast.Import, ast.ImportFrom)
  return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def _imported(
  name: str, path: pathlib.Path, *, at_run_time: bool
) -> Iterator[str]:
  """Slashed paths that a file imports: `a/b/c` for `from a.b import c`."""
  package = name if path.stem == "__init__" else name.rpartition("/")[0]
  text = path.read_text()
  for node in _import_statements(text, at_run_time=at_run_time):
    if isinstance(node, ast.Import):
      yield from (alias.name.replace(".", "/") for alias in node.names)
    else:
      parts = node.module.split(".") if node.module else []
      if node.level:
        above = package.split("/")
        parts = above[: len(above) - node.level + 1] + parts
      yield from ("/".join([*parts, alias.name]) for alias in node.names)


def read_imports(
  root: pathlib.Path, *, at_run_time: bool
) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
  """What every module imports: (modules, top-level names outside)."""
  files = read_files(root)
  inside: dict[str, set[str]] = {name: set() for name in files}
  outside: dict[str, set[str]] = {name: set() for name in files}
  for name, path in files.items():
    for wanted in _imported(name, path, at_run_time=at_run_time):
      found = wanted
      while found and found not in files:  # `a/b/Name` is module `a/b`.
        found = found.rpartition("/")[0]
      if found:
        inside[name].add(found)
      else:
        outside[name].add(wanted.partition("/")[0])
  return inside, outside


def read_owners(root: pathlib.Path, targets: list[Target]) -> dict[str, str]:
  """The library, or the tests, that each module belongs to."""
  names = {path: name for name, path in read_files(root).items()}
  return {
    names[root / src]: target.label
    for target in targets
    if target.rule != "dp_commands"
    for src in target.srcs
    if root / src in names
  }


def wanted_deps(root: pathlib.Path, targets: list[Target]) -> dict[str, set]:
  """The `deps` that every target ought to have, by its label."""
  owners = read_owners(root, targets)
  inside, _ = read_imports(root, at_run_time=False)
  wanted: dict[str, set[str]] = {target.label: set() for target in targets}
  for name, owner in owners.items():
    wanted[owner] |= {owners[other] for other in inside[name] & {*owners}}
  for target in targets:
    if target.rule == "dp_tests":
      wanted[target.label] |= {*OF_ALL_TESTS}
    if target.rule == "dp_package":
      wanted[target.label] |= {*OF_ALL}
    if target.rule == "dp_commands":
      wanted[target.label] = {*target.deps}
    wanted[target.label].discard(target.label)
  return wanted


def find_problems(root: pathlib.Path) -> list[str]:
  """Every way in which BUILD and the imports disagree; empty if they agree."""
  targets = read_targets(root)
  files = read_files(root)
  names = {path: name for name, path in files.items()}
  owned = [
    names.get(root / src, src)
    for target in targets
    if target.rule != "dp_commands"
    for src in target.srcs
  ]
  problems = [
    f"{name} is in {owned.count(name)} libraries"
    for name in sorted({*files, *owned})
    if owned.count(name) != 1 or name not in files
  ]
  programs = {
    name
    for name, path in files.items()
    if name.partition("/")[0] in ("dpdist", "launch")
    and '\nif __name__ == "__main__":\n' in path.read_text()
  }
  commands = {
    t.label.replace(":", "/") for t in targets if t.rule == "dp_commands"
  }
  problems += [f"{name} is in no dp_commands" for name in programs - commands]
  problems += [f"{name}.py is no program" for name in commands - programs]
  wanted = wanted_deps(root, targets)
  by_label = {target.label: target for target in targets}
  for target in targets:
    name, deps, edges = (
      short(target.label),
      {*target.deps},
      wanted[target.label],
    )
    problems += [f"{name} lacks {short(dep)}" for dep in edges - deps]
    problems += [f"{name} never uses {short(dep)}" for dep in deps - edges]
    problems += [
      f"{name} may not see {short(dep)}"
      for dep in edges & {*by_label}
      if not _sees(target.label, by_label[dep])
    ]
  return problems + [*_find_arrows_up(wanted)]


def _sees(label: str, target: Target) -> bool:
  """Whether BUILD lets a target have another one as a dep."""
  here, there = label.partition(":")[0], target.label.partition(":")[0]
  for pattern in target.visibility:
    if pattern == "//visibility:public" or here == there:
      return True
    folder, _, kind = pattern.removeprefix("//").partition(":")
    below = not folder or here == folder or here.startswith(folder + "/")
    if kind == "__subpackages__" and below:
      return True
    if kind == "__pkg__" and here == folder:
      return True
  return here == there


def _find_arrows_up(wanted: dict[str, set[str]]) -> Iterator[str]:
  heights = {name: i for i, row in enumerate(LAYERS) for name in row}
  for label, deps in wanted.items():
    name = short(label)
    if name.partition("/")[0].partition(":")[0] == "tests":
      continue
    base = name if name in heights else name.partition(":")[0]
    if base not in heights:
      yield f"package {name} is in no layer"
      continue
    for dep in map(short, deps):
      if base == dep:
        continue
      if heights.get(dep, len(LAYERS)) >= heights[base]:
        yield f"{name} may not reach up or across to {dep}"


def find_circles(root: pathlib.Path) -> list[str]:
  """Modules that import one another, by way of others or not."""
  inside, _ = read_imports(root, at_run_time=False)
  done: set[str] = set()
  found = []

  def visit(name: str, above: tuple[str, ...]) -> None:
    if name in above:
      found.append(" -> ".join([*above[above.index(name) :], name]))
    elif name not in done:
      for other in sorted(inside[name] - {name}):
        visit(other, (*above, name))
      done.add(name)

  for name in inside:
    visit(name, ())
  return found


def find_strangers_met(root: pathlib.Path) -> list[str]:
  """Imports between two of the packages that must not know one another."""
  part = lambda name: (name.split("/") + [""])[1]
  return [
    f"{name} imports {dep}"
    for name, deps in read_imports(root, at_run_time=False)[0].items()
    for dep in sorted(deps)
    if name.startswith("dpdist/") and dep.startswith("dpdist/")
    if {part(name), part(dep)} <= {*STRANGERS} and part(name) != part(dep)
  ]


def find_too_long(root: pathlib.Path) -> list[str]:
  """Modules, functions and folders of the product that are too long to read."""
  found = []
  folders: dict[str, int] = {}
  for name, path in read_files(root).items():
    if name.partition("/")[0] not in ("dpdist", "launch"):
      continue
    text = path.read_text()
    num_lines = len(text.splitlines())
    if num_lines > LINES_OF_A_MODULE:
      found.append(f"{name} has {num_lines} lines")
    if path.stem != "__init__":
      folder = path.parent.relative_to(root).as_posix()
      folders[folder] = folders.get(folder, 0) + 1
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        num_lines = (node.end_lineno or 0) - node.lineno + 1
        if num_lines > LINES_OF_A_FUNCTION:
          found.append(f"{name}.{node.name} has {num_lines} lines")
  return found + [
    f"{folder} has {number} modules"
    for folder, number in folders.items()
    if number > MODULES_OF_A_FOLDER
  ]


# For the tree as it is, which no test changes.
_read_once = functools.cache(read_imports)


def reach(root: pathlib.Path, start: str) -> set[str]:
  """Top-level packages outside the project that importing `start` may load."""
  read = _read_once if root == ROOT else read_imports
  inside, outside = read(root, at_run_time=True)
  waiting, seen = {start}, set()
  while waiting:
    name = waiting.pop()
    seen.add(name)
    packages = {p.as_posix() for p in pathlib.PurePosixPath(name).parents}
    waiting |= (inside[name] | (packages & {*inside})) - seen
  return set().union(*(outside[name] for name in seen))


# The tree as it is.


def test_build_is_the_import_diagram() -> None:
  assert not find_problems(ROOT)


def test_no_module_imports_itself_by_way_of_others() -> None:
  assert not find_circles(ROOT)


def test_strangers_never_meet() -> None:
  assert not find_strangers_met(ROOT)


def test_nothing_is_too_long_to_read() -> None:
  assert not find_too_long(ROOT)


def test_the_top_is_a_map_and_the_whole_is_short() -> None:
  files = [ROOT / "BUILD"]
  files += [path for top in FOLDERS for path in (ROOT / top).rglob("BUILD")]
  lines = [len(path.read_text().splitlines()) for path in files]
  assert lines[0] < 120
  assert sum(lines) < 1_100


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_budget_side_never_reaches_jax(name: str) -> None:
  assert not reach(ROOT, name) & ACCELERATED


def test_configs_never_reach_jax() -> None:
  configs = [n for n in read_files(ROOT) if n.startswith("configs/")]
  assert configs
  for name in configs:
    assert not reach(ROOT, name) & ACCELERATED, name


def test_step_reaches_jax() -> None:
  """The search can find what the tests above say is not there."""
  assert {"jax", "optax"} <= reach(ROOT, "dpdist/training/step")


# Copies, each broken in one way, and the complaint that must be heard.


@pytest.fixture(name="copy")
def fixture_copy(tmp_path: pathlib.Path) -> pathlib.Path:
  unwanted = shutil.ignore_patterns("__pycache__", "*.patch")
  for folder in FOLDERS:
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unwanted)
  return tmp_path


def _append(path: pathlib.Path, text: str) -> None:
  path.write_text(path.read_text() + text)


def _change(path: pathlib.Path, old: str, new: str) -> None:
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


def test_a_whole_copy_is_sound(copy: pathlib.Path) -> None:
  assert not find_problems(copy)


def test_notices_a_file_without_a_library(copy: pathlib.Path) -> None:
  stray = copy / "dpdist" / "stray.py"
  stray.write_text("")
  assert find_problems(copy) == ["dpdist/stray is in 0 libraries"]


def test_notices_a_library_without_a_file(copy: pathlib.Path) -> None:
  (copy / "dpdist" / "config.py").unlink()
  problems = find_problems(copy)
  assert "dpdist/config.py is in 1 libraries" in problems


def test_notices_a_file_in_two_libraries(copy: pathlib.Path) -> None:
  _append(
    copy / "dpdist" / "keys" / "BUILD",
    '\npy_library(name = "more", srcs = ["keys.py"])\n',
  )
  assert "dpdist/keys/keys is in 2 libraries" in find_problems(copy)


def test_notices_a_dep_that_is_missing(copy: pathlib.Path) -> None:
  build = copy / "dpdist" / "noise" / "BUILD"
  _change(build, '"//dpdist/keys",', "")
  assert find_problems(copy) == ["dpdist/noise lacks dpdist/keys"]


@pytest.mark.parametrize(
  "code",
  [
    "import dpdist.keys",
    "from dpdist.keys import keys",
    "from dpdist.keys.keys import derive as d",
    "from .. import keys",
    "from ..keys.keys import derive",
    "def f():\n  from dpdist.keys import keys",
    "if TYPE_CHECKING:\n  from dpdist.keys import keys",
  ],
)
def test_notices_an_import_without_a_dep(copy: pathlib.Path, code: str) -> None:
  _append(copy / "dpdist" / "accounting" / "calibration.py", f"\n{code}\n")
  assert find_problems(copy) == ["dpdist/accounting lacks dpdist/keys"]


def test_notices_a_dep_without_an_import(copy: pathlib.Path) -> None:
  build = copy / "dpdist" / "noise" / "BUILD"
  _change(build, '"//dpdist/keys"', '"//dpdist/keys", "//dpdist/sums"')
  assert find_problems(copy) == ["dpdist/noise never uses dpdist/sums"]


def test_notices_an_upward_edge_that_build_admits(copy: pathlib.Path) -> None:
  code = "\nfrom dpdist.privacy import plan\n"
  _append(copy / "dpdist" / "noise" / "noise.py", code)
  build = copy / "dpdist" / "noise" / "BUILD"
  _change(build, '"//dpdist/keys"', '"//dpdist/keys", "//dpdist/privacy"')
  assert find_problems(copy) == [
    "dpdist/noise may not reach up or across to dpdist/privacy"
  ]


def test_notices_a_package_in_no_layer(copy: pathlib.Path) -> None:
  folder = copy / "dpdist" / "utils"
  folder.mkdir()
  (folder / "utils.py").write_text("")
  (folder / "BUILD").write_text("dp_package()")
  assert find_problems(copy) == ["package dpdist/utils is in no layer"]


def test_notices_who_looks_at_what_is_private(copy: pathlib.Path) -> None:
  code = "\nfrom dpdist.clipping.engines import vmap\n"
  _append(copy / "dpdist" / "training" / "step.py", code)
  assert set(find_problems(copy)) == {
    "dpdist/training lacks dpdist/clipping/engines",
    "dpdist/training may not see dpdist/clipping/engines",
  }


def test_notices_a_command_that_cannot_be_run(copy: pathlib.Path) -> None:
  _change(copy / "launch" / "BUILD", '"verify",', '"verfy",')
  assert set(find_problems(copy)) == {
    "launch/verify is in no dp_commands",
    "launch/verfy.py is no program",
  }


def test_notices_a_circle(copy: pathlib.Path) -> None:
  code = "\nfrom dpdist.accounting import calibration\n"
  _append(copy / "dpdist" / "accounting" / "search.py", code)
  circles = find_circles(copy)
  assert circles
  assert all("dpdist/accounting/search" in circle for circle in circles)


def test_notices_strangers_meeting(copy: pathlib.Path) -> None:
  code = "\nfrom dpdist.accounting import rdp\n"
  _append(copy / "dpdist" / "noise" / "noise.py", code)
  assert find_strangers_met(copy) == [
    "dpdist/noise/noise imports dpdist/accounting/rdp"
  ]


def test_notices_a_module_that_is_too_long(copy: pathlib.Path) -> None:
  _append(copy / "dpdist" / "keys" / "keys.py", "#\n" * LINES_OF_A_MODULE)
  (problem,) = find_too_long(copy)
  assert problem.startswith("dpdist/keys/keys has ")


def test_notices_a_function_that_is_too_long(copy: pathlib.Path) -> None:
  signature, line = "\nclass C:\n  async def f(self):\n", "    pass\n"
  most = line * (LINES_OF_A_FUNCTION - 1)
  _append(copy / "launch" / "verify.py", signature + most)
  assert not find_too_long(copy)
  _append(copy / "launch" / "verify.py", signature + most + line)
  assert find_too_long(copy) == ["launch/verify.f has 81 lines"]


def test_notices_a_folder_of_too_many_modules(copy: pathlib.Path) -> None:
  for number in range(MODULES_OF_A_FOLDER):
    (copy / "dpdist" / "keys" / f"more_{number}.py").write_text("")
  assert find_too_long(copy) == ["dpdist/keys has 13 modules"]


@pytest.mark.parametrize(
  "file", ["accounting/calibration.py", "__init__.py", "keys/keys.py"]
)
def test_notices_jax_on_the_budget_side(copy: pathlib.Path, file: str) -> None:
  """In the module, in what it reaches, and in the package around it."""
  _append(copy / "dpdist" / file, "\ndef f():\n  import jax.numpy as jnp\n")
  name = "dpdist/keys/keys" if "keys" in file else "dpdist/privacy/plan"
  assert "jax" in reach(copy, name)

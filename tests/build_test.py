"""BUILD is the import diagram: held against the real imports, both ways.

A target is named after its file: `dpdist/plan` for `dpdist/plan.py`, and
`dpdist/clipping` for `dpdist/clipping/__init__.py`. Its `deps` are what that
file imports from the project, no more and no less, wherever in the file the
import stands. Code that it starts as a program is `data`.

That a submodule's import also runs the packages around it is left out of BUILD
(Bazel puts empty ones there) but not out of the search for jax.
"""

import ast
from collections.abc import Iterator
import functools
import pathlib
import shutil
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("dpdist", "launch", "configs", "tests")
RUNNER = "tests/run.py"

# Lowest first. A room imports from lower layers only, never from its own; the
# modules of one room may import one another.
LAYERS = (
  ("keys", "hosts", "rendezvous", "mesh", "fixed_point", "search")
  + ("audit_bounds", "fields", "made_up")
  + (
    "seals",
    "liveness",
    "file_stamps",
    "stores",
    "progress",
    "signals",
    "maintenance",
  )
  + ("events", "chips", "compiled", "products", "archives")
  + ("scattering", "augment", "pictures", "chance"),
  ("pairs", "gaussian", "fetch", "scaled_scattering"),
  ("mixtures",),
  ("records", "renyi", "loss_distributions", "verdict"),
  ("accountants",),
  ("accounting", "sampling", "noise", "clipping", "peers"),
  ("plan",),
  ("rounding", "statements"),
  ("mechanism", "config", "dp_config", "composition", "history")
  + ("tradeoffs", "tradeoff_plot"),
  ("gradients", "stateful", "ledger", "manifest", "step", "metrics", "sources")
  + ("models", "losses", "optimizers", "preemption", "provenance")
  + ("operations", "model_check", "comparison"),
  ("trials",),
  ("units", "parameters", "tokens", "sentinel"),
  ("chitchat", "cifar", "adult", "reviews", "sentences", "speeches")
  + ("step_sentinel",),
  ("features",),
  ("data", "data_budget", "datasets", "retrying", "screen", "drawing")
  + ("checkpoint", "exact_step", "odometer", "watch"),
  ("report", "data_checks", "charging"),
  ("admission", "verification", "display"),
  ("job", "frontends"),
  ("summary", "shapes", "dry_run"),
  ("forecast", "released", "speed"),
  ("model_card", "autotune"),
  ("export",),
  ("train", "canaries"),
  ("audit",),
  ("audit_plot",),
  ("dpdist",),
  ("examples",),
  ("configs",),
  ("launch",),
  ("tests",),
)
_HEIGHT = {name: i for i, row in enumerate(LAYERS) for name in row}
STRANGERS = ("accounting", "sampling", "noise", "clipping")

# What must answer on a machine without an accelerator's stack.
WITHOUT_JAX = (
  "dpdist/accounting",
  "dpdist/audit_bounds",
  "dpdist/composition",
  "dpdist/data_budget",
  "dpdist/dp_config",
  "dpdist/keys",
  "dpdist/ledger",
  "dpdist/plan",
  "dpdist/sampling",
  "dpdist/verification",
  "launch/budget",
  "launch/local",
  "launch/ray_driver",
  "launch/submit",
  "launch/verify",
)
ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax", "grain"}


class Target(NamedTuple):
  """One rule of BUILD; `deps` and `data` are names: labels less the colon."""

  rule: str
  name: str
  srcs: tuple[str, ...]
  deps: tuple[str, ...]
  data: tuple[str, ...]
  args: tuple[str, ...]


def read_targets(root: pathlib.Path) -> list[Target]:
  """BUILD's targets in order. Raises ValueError on anything but literals."""
  targets = []
  for statement in ast.parse((root / "BUILD").read_text()).body:
    call = getattr(statement, "value", None)
    if isinstance(call, ast.Constant):  # The file's own docstring.
      continue
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
      raise ValueError(f"BUILD:{statement.lineno} must be a call")
    if not call.func.id.startswith("py_"):  # load() and package().
      continue
    try:
      given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except ValueError:
      raise ValueError(
        f"BUILD:{call.lineno} must be all literals: no glob, no variable"
      ) from None
    deps, data = (
      tuple(label[1:] for label in given.get(key, ()) if label[0] == ":")
      for key in ("deps", "data")
    )
    targets.append(
      Target(
        call.func.id,
        given["name"],
        tuple(given["srcs"]),
        deps,
        data,
        tuple(given.get("args", ())),
      )
    )
  return targets


def read_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Every Python file below the four folders, by its target's name."""
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
  """What every file imports: (in the project, top-level names outside it)."""
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


def direct_edges(root: pathlib.Path) -> dict[str, set[str]]:
  """The `deps` that every target ought to have."""
  files = read_files(root)
  edges, _ = read_imports(root, at_run_time=False)
  for name in files:
    if name.endswith("_test"):
      for folder in pathlib.PurePosixPath(name).parents:
        if f"{folder}/conftest" in files:
          edges[name].add(f"{folder}/conftest")
    edges[name].discard(name)
  return edges


def room(name: str) -> str:
  """`clipping` for `dpdist/clipping/rules`, `launch` for `launch/train`."""
  top, _, rest = name.partition("/")
  return rest.partition("/")[0] if top == "dpdist" and rest else top


def find_problems(root: pathlib.Path) -> list[str]:
  """Every way in which BUILD and the imports disagree; empty if they agree."""
  try:
    targets = read_targets(root)
  except ValueError as error:
    return [str(error)]
  files = read_files(root)
  unknown = {room(name) for name in files} - {*_HEIGHT}
  if unknown:
    return [f"room {name} is in no layer" for name in sorted(unknown)]
  edges = direct_edges(root)
  names = [target.name for target in targets]
  problems = [
    f":{name} is declared {names.count(name)} times"
    for name in files
    if names.count(name) != 1
  ]
  before: list[str] = []
  for target in targets:
    if target.name not in files:
      problems.append(f":{target.name} is not named after a file")
      continue
    problems += _find_problems_of(
      root, files[target.name], target, edges[target.name], before
    )
    before.append(target.name)
  return problems


def _find_problems_of(
  root: pathlib.Path,
  path: pathlib.Path,
  target: Target,
  edges: set[str],
  before: list[str],
) -> Iterator[str]:
  """What is wrong with one target, given the names of those before it."""
  name, deps = f":{target.name}", {*target.deps}
  rule = _rule(path)
  if target.rule != rule:
    yield f"{name} should be a {rule}"
  srcs = {path.relative_to(root).as_posix()}
  if rule == "py_test":
    srcs.add(RUNNER)
    if target.args[-1:] != (f"{target.name}.py",):
      yield f"{name} should run {target.name}.py"
  if {*target.srcs} != srcs:
    yield f"{name} should have the srcs {sorted(srcs)}"
  yield from (f"{name} lacks :{dep}" for dep in edges - deps)
  yield from (f"{name} never uses :{dep}" for dep in deps - edges)
  for dep in target.deps + target.data:
    if dep not in before:
      yield f"{name} comes before its dep :{dep}"
  here = room(target.name)
  for dep in edges:
    if room(dep) != here and _HEIGHT[room(dep)] >= _HEIGHT[here]:
      yield f"{name} may not reach up or across to :{dep}"
  if before and _HEIGHT[room(before[-1])] > _HEIGHT[here]:
    yield f"{name} comes after the higher :{before[-1]}"


def _rule(path: pathlib.Path) -> str:
  if path.stem.endswith("_test"):
    return "py_test"
  is_program = '\nif __name__ == "__main__":\n' in path.read_text()
  return "py_binary" if is_program else "py_library"


def find_strangers_met(root: pathlib.Path) -> list[str]:
  """Imports between two of the rooms that must not know one another."""
  return [
    f"{name} imports {dep}"
    for name, deps in direct_edges(root).items()
    for dep in deps
    if {room(name), room(dep)} <= {*STRANGERS} and room(name) != room(dep)
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


def test_strangers_never_meet() -> None:
  assert not find_strangers_met(ROOT)


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
  assert {"jax", "optax"} <= reach(ROOT, "dpdist/step")


# Copies, each broken in one way, and the complaint that must be heard.


@pytest.fixture(name="copy")
def fixture_copy(tmp_path: pathlib.Path) -> pathlib.Path:
  unwanted = shutil.ignore_patterns("__pycache__")
  for folder in FOLDERS:
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unwanted)
  shutil.copy(ROOT / "BUILD", tmp_path)
  return tmp_path


def _append(path: pathlib.Path, text: str) -> None:
  path.write_text(path.read_text() + text)


def _set_deps(root: pathlib.Path, name: str, deps: set[str]) -> None:
  """Rewrites one target's deps; BUILD's comments are lost."""
  tree = ast.parse((root / "BUILD").read_text())
  for call in ast.walk(tree):
    if isinstance(call, ast.Call):
      given = {k.arg: k.value for k in call.keywords}
      if "name" in given and ast.literal_eval(given["name"]) == name:
        labels = ast.parse(str([f":{d}" for d in sorted(deps)]), mode="eval")
        call.keywords = [k for k in call.keywords if k.arg != "deps"]
        call.keywords.append(ast.keyword("deps", labels.body))
  (root / "BUILD").write_text(ast.unparse(tree))


def test_a_whole_copy_is_sound(copy: pathlib.Path) -> None:
  _set_deps(copy, "dpdist/plan", direct_edges(copy)["dpdist/plan"])
  assert not find_problems(copy)


def test_notices_a_file_without_a_target(copy: pathlib.Path) -> None:
  (copy / "configs" / "stray.py").write_text("")
  assert find_problems(copy) == [":configs/stray is declared 0 times"]


def test_notices_a_target_without_a_file(copy: pathlib.Path) -> None:
  (copy / "dpdist" / "plan.py").unlink()
  assert ":dpdist/plan is not named after a file" in find_problems(copy)


@pytest.mark.parametrize(
  ("name", "problem"),
  [
    ("dpdist/plan", ":dpdist/plan is declared 2 times"),
    ("plan", ":plan is not named after a file"),
  ],
)
def test_notices_a_file_in_two_targets(
  copy: pathlib.Path, name: str, problem: str
) -> None:
  target = f'\npy_library(name = "{name}", srcs = ["dpdist/plan.py"])'
  _append(copy / "BUILD", target)
  assert problem in find_problems(copy)


def test_notices_the_wrong_srcs(copy: pathlib.Path) -> None:
  build = (copy / "BUILD").read_text()
  (copy / "BUILD").write_text(build.replace('["dpdist/plan.py"]', "[]"))
  assert find_problems(copy) == [
    ":dpdist/plan should have the srcs ['dpdist/plan.py']"
  ]


def test_notices_a_dep_that_is_missing(copy: pathlib.Path) -> None:
  deps = direct_edges(copy)["dpdist/plan"]
  _set_deps(copy, "dpdist/plan", deps - {"dpdist/accounting"})
  assert find_problems(copy) == [":dpdist/plan lacks :dpdist/accounting"]


@pytest.mark.parametrize(
  "code",
  [
    "import dpdist.keys",
    "from dpdist import keys",
    "from dpdist.keys import derive as d",
    "from . import keys",
    "from .keys import derive",
    "def f():\n  from dpdist import keys",
    "if TYPE_CHECKING:\n  from dpdist import keys",
  ],
)
def test_notices_an_import_without_a_dep(copy: pathlib.Path, code: str) -> None:
  _append(copy / "dpdist" / "accounting.py", f"\n{code}\n")
  assert find_problems(copy) == [":dpdist/accounting lacks :dpdist/keys"]


def test_notices_a_dep_without_an_import(copy: pathlib.Path) -> None:
  deps = direct_edges(copy)["dpdist/accounting"]
  _set_deps(copy, "dpdist/accounting", deps | {"dpdist/keys"})
  assert find_problems(copy) == [":dpdist/accounting never uses :dpdist/keys"]


def test_notices_an_upward_edge_that_build_admits(copy: pathlib.Path) -> None:
  _append(copy / "dpdist" / "plan.py", "\nfrom dpdist import train\n")
  _set_deps(copy, "dpdist/plan", direct_edges(copy)["dpdist/plan"])
  assert set(find_problems(copy)) == {
    ":dpdist/plan comes before its dep :dpdist/train",
    ":dpdist/plan may not reach up or across to :dpdist/train",
  }


def test_notices_targets_out_of_layer_order(copy: pathlib.Path) -> None:
  tree = ast.parse((copy / "BUILD").read_text())
  tree.body.append(tree.body.pop(2))  # Past load() and package().
  (copy / "BUILD").write_text(ast.unparse(tree))
  assert any("comes after the higher" in p for p in find_problems(copy))


def test_notices_a_room_in_no_layer(copy: pathlib.Path) -> None:
  (copy / "dpdist" / "utils.py").write_text("")
  assert find_problems(copy) == ["room utils is in no layer"]


def test_notices_a_glob(copy: pathlib.Path) -> None:
  _append(copy / "BUILD", '\npy_library(name = "x", srcs = glob(["*.py"]))\n')
  (problem,) = find_problems(copy)
  assert "no glob" in problem


def test_notices_the_wrong_rule(copy: pathlib.Path) -> None:
  build = (copy / "BUILD").read_text()
  door = 'py_binary(\n    name = "launch/train"'
  assert door in build
  (copy / "BUILD").write_text(
    build.replace(door, door.replace("binary", "library"))
  )
  assert find_problems(copy) == [":launch/train should be a py_binary"]


def test_notices_a_test_that_runs_another(copy: pathlib.Path) -> None:
  build = (copy / "BUILD").read_text()
  mine = 'args = ["tests/keys_test.py"]'
  assert mine in build
  (copy / "BUILD").write_text(
    build.replace(mine, 'args = ["tests/mesh_test.py"]')
  )
  assert find_problems(copy) == [
    ":tests/keys_test should run tests/keys_test.py"
  ]


def test_notices_strangers_meeting(copy: pathlib.Path) -> None:
  _append(copy / "dpdist" / "noise.py", "\nfrom dpdist import accounting\n")
  assert find_strangers_met(copy) == ["dpdist/noise imports dpdist/accounting"]
  _set_deps(copy, "dpdist/noise", direct_edges(copy)["dpdist/noise"])
  assert (
    ":dpdist/noise may not reach up or across to :dpdist/accounting"
    in find_problems(copy)
  )


@pytest.mark.parametrize("file", ["accounting.py", "__init__.py", "keys.py"])
def test_notices_jax_on_the_budget_side(copy: pathlib.Path, file: str) -> None:
  """In the module, in what it reaches, and in the package around it."""
  _append(copy / "dpdist" / file, "\ndef f():\n  import jax.numpy as jnp\n")
  name = "dpdist/keys" if file == "keys.py" else "dpdist/plan"
  assert "jax" in reach(copy, name)

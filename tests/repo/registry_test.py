"""Names of things that are plugged in, and a toy of each kind from outside."""

import functools
import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist import _own_code
from dpdist import config as config_lib
from dpdist import errors
from dpdist import registry
from dpdist.ledger import ledger as ledger_lib
from launch.engines import engines
from tests.support import commands
from tests.support import turns

pytestmark = pytest.mark.usefixtures("quick_compiles")

_DATASET = """
import numpy as np
from dpdist.data import arrays
import dpdist


def load(config):
  del config
  rng = np.random.default_rng(0)
  part = lambda n: arrays.ArraySource({
    "inputs": rng.normal(size=(n, 4)).astype(np.float32),
    "targets": rng.integers(0, 2, n).astype(np.int32),
  })
  return dpdist.Dataset(part(32), part(8))
"""

_PARTS = """
from flax import linen as nn
import jax.numpy as jnp
import optax

import dpdist


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(jnp.tanh(x.ravel()))


def make_model(config):
  return Net()


def make_task(config):
  return dpdist.tasks.classification(Net())


def make_optimizer(learning_rate, scale=1.0):
  return optax.sgd(scale * learning_rate(0))
"""

_ENGINE = """
import dataclasses
from launch.engines import job

TOOL = ("echo", "the shell's own")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(job.Job):
  queue: str = job.word("", "Where the job waits.")


def files(job):
  return {"job.txt": f"{job.queue} {' '.join(job.train('python'))}"}


def command(job, folder):
  return ["echo", f"{job.nodes} of {job.queue}"]
"""
_SUBMIT = ("submit", "--config=configs/digits.py", "--workdir=/shared/digits")


@pytest.fixture(name="outside")
def fixture_outside(tmp_path, monkeypatch):
  """A folder of packages, as if installed, and a process that knows none."""
  monkeypatch.syspath_prepend(tmp_path)
  _start_again(monkeypatch)
  yield tmp_path
  _start_again(monkeypatch)


def _start_again(monkeypatch):
  """Forgets what another process would not know."""
  for name in [*sys.modules]:
    if name.partition(".")[0] in ("toy_data", "toy_engine", "launch_toy"):
      del sys.modules[name]
  monkeypatch.setattr(registry, "_digests", {})
  importlib.invalidate_caches()


def _resolve(name="toy_data:load"):
  return registry.resolve("dataset", name, setting="data.name")


def _digest(name="toy_data:load"):
  return registry.code_sha256("dataset", name, setting="data.name")


def _config(**changes):
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      "data.name": "toy_data:load",
      "model.name": "linear",
      "model.num_outputs": 2,
      "privacy.num_examples": 32,
      "privacy.expected_batch_size": 8,
      "privacy.num_steps": 4,
      "privacy.noise_multiplier": 2.0,
      "insecure_seed": 1,
      **changes,
    }
  )
  return config


@pytest.mark.slow
def test_a_run_trains_on_a_data_set_from_outside(outside, tmp_path):
  (outside / "toy_data.py").write_text(_DATASET)
  result = dpdist.train(_config(), tmp_path / "run")
  assert result["num_steps"] == 4


def test_other_code_from_outside_gets_other_keys(
  outside, tmp_path, monkeypatch
):
  """What converts the examples is no part of their digest."""
  (outside / "toy_data.py").write_text(_DATASET)
  workdir = tmp_path / "run"
  dpdist.train(_config(checkpoint_every=2), workdir)
  before = ledger_lib.Ledger(workdir / "ledger").branches
  (workdir / "result.json").unlink()
  (outside / "toy_data.py").write_text(_DATASET + "\n# Another.\n")
  _start_again(monkeypatch)
  dpdist.train(_config(checkpoint_every=2), workdir)
  after = ledger_lib.Ledger(workdir / "ledger").branches
  assert len(after) == len(before) + 1
  assert after[-1].identity != before[-1].identity


@pytest.mark.parametrize(
  "setting",
  turns.cells(["task", "model.name", "optimizer.name"], always=["task"]),
)
@pytest.mark.slow
def test_so_does_a_task_a_model_and_an_optimizer_from_outside(
  outside, tmp_path, monkeypatch, setting
):
  function = f"make_{setting.partition('.')[0]}"
  changes = {setting: f"toy_data:{function}", "data.name": "digits"}
  changes["model.num_outputs"] = 10

  for number, source in enumerate((_PARTS, _PARTS + "# Another.\n")):
    (outside / "toy_data.py").write_text(source)
    _start_again(monkeypatch)
    changes |= {"privacy.num_examples": 1438, "privacy.num_steps": 2}
    dpdist.train(_config(**changes), tmp_path / "run")
    branches = ledger_lib.Ledger(tmp_path / "run" / "ledger").branches
    assert len(branches) == number + 1
    (tmp_path / "run" / "result.json").unlink()


def _package(outside):
  package = outside / "toy_data"
  (package / "fast").mkdir(parents=True)
  (package / "__init__.py").write_text("")
  (package / "loader.py").write_text(_DATASET)
  (package / "fast" / "__init__.py").write_text("x = 1")
  return package


@pytest.mark.parametrize(
  "change",
  [
    lambda package: (package / "other.py").write_text("x = 1"),
    lambda package: (package / "loader.py").write_text(_DATASET + "\n"),
    lambda package: (package / "fast").rename(package / "slow"),
    lambda package: (package / "other.so").write_bytes(b"1"),
  ],
)
def test_the_digest_is_of_all_code_of_the_package(outside, change, monkeypatch):
  package = _package(outside)
  _resolve("toy_data.loader:load")
  before = _digest("toy_data.loader:load")
  assert before
  change(package)
  _start_again(monkeypatch)
  _resolve("toy_data.loader:load")
  assert _digest("toy_data.loader:load") != before


def test_what_is_edited_while_a_run_starts_is_refused(outside):
  """The digest would be that of code which this process has not read."""
  (outside / "toy_data.py").write_text(_DATASET)
  _resolve()
  (outside / "toy_data.py").write_text(_DATASET + "\n")
  with pytest.raises(errors.ArgumentError, match="start it again"):
    _digest()


def test_what_was_edited_after_its_import_is_refused(outside):
  (outside / "toy_data.py").write_text(_DATASET)
  importlib.import_module("toy_data")
  (outside / "toy_data.py").write_text(_DATASET + "\n")
  with pytest.raises(errors.ArgumentError, match="start it again"):
    _resolve()


def test_ours_are_no_code_from_outside():
  name = "digits"
  assert len(_resolve(name)(_config(**{"data.name": name}).data).train) == 1438
  assert _digest(name) == ""


def test_who_wraps_a_function_of_ours_is_told_apart_by_the_own_code(outside):
  (outside / "toy_data.py").write_text(
    _DATASET
    + """
import functools
from dpdist.data.datasets import datasets as ours
wrapped = functools.wraps(ours.load)(lambda config: load(config))
"""
  )
  _resolve("toy_data:wrapped")
  assert _digest("toy_data:wrapped")


def test_a_package_that_has_our_name_is_none_of_ours(outside, monkeypatch):
  """Ours are told by where they are."""
  (outside / "launch_toy.py").write_text(_DATASET)
  module = importlib.import_module("launch_toy")
  monkeypatch.setitem(sys.modules, "launch", module)
  monkeypatch.setattr(module, "__name__", "launch")
  assert not registry._is_ours("launch")


def test_a_launch_beside_an_installed_dpdist_is_none_of_ours(
  tmp_path, monkeypatch
):
  """Nor are the configs that come with it, which are settings."""
  monkeypatch.setattr(_own_code, "_ROOT", tmp_path)
  assert _own_code.has(tmp_path / "launch" / "train.py")
  installed = tmp_path / "dpdist" / "launch" / "__init__.py"
  installed.parent.mkdir(parents=True)
  installed.touch()
  assert not _own_code.has(tmp_path / "launch" / "train.py")
  assert _own_code.has(installed)
  assert _own_code.has(tmp_path / "dpdist" / "config.py")
  assert not _own_code.has(tmp_path / "dpdist" / "configs" / "digits.py")


def test_code_that_is_in_no_file_is_refused(outside, monkeypatch):
  """As that of a notebook."""
  module = types.ModuleType("toy_data")
  exec(_DATASET, module.__dict__)
  monkeypatch.setitem(sys.modules, "toy_data", module)
  with pytest.raises(errors.ArgumentError, match="code that is in files"):
    _resolve()


def test_so_is_code_of_a_module_without_a_name():
  names = {"__builtins__": __builtins__}
  exec("def read(text):\n  return [0]", names)
  del names["__builtins__"]
  with pytest.raises(errors.ArgumentError, match="code that is in files"):
    registry.code_sha256_of([names["read"]], setting="x", needs_files=True)


def test_a_loader_that_registers_itself_is_told_apart(outside):
  (outside / "toy_data.py").write_text(
    _DATASET
    + """
import functools
from dpdist import registry
class Loader:
  def __call__(self, config):
    return load(config)
registry.register("dataset", "toy")(Loader())
"""
  )
  importlib.import_module("toy_data")
  try:
    _resolve("toy")
    assert _digest("toy")
  finally:
    del registry._things["dataset"]["toy"]


@pytest.fixture(name="engine")
def fixture_engine(outside):
  """An engine in one file, and the entry point that makes it known."""
  path = outside / "toy_engine.py"
  path.write_text(_ENGINE)
  info = outside / "toy_engine-1.dist-info"
  info.mkdir()
  (info / "METADATA").write_text("Name: toy_engine\nVersion: 1\n")
  (info / "entry_points.txt").write_text("[dpdist.engine]\ntoy = toy_engine\n")
  return path


def test_an_engine_of_an_entry_point_submits_with_its_own_flags(engine, capfd):
  submit = (*_SUBMIT, "--to=toy", "--queue=long", "--nodes=3")
  done = commands.run(*submit, "--dry_run")
  assert done.code == 0, done.err
  assert "long python -u -m launch.train --config=configs/digits" in done.out
  assert "--workdir=/shared/digits" in done.out
  assert commands.run(*submit).code == 0
  assert "3 of long" in capfd.readouterr().out


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--to=toy", "--queue=a b"), "queue must be letters, digits"),
    (("--to=toy", "--nodes=0"), "nodes must be an integer >= 1, got 0"),
    (("--to=toy", "--partition=a"), "--partition does not go with --to=toy"),
    (("--to=slurm", "--queue=a"), "--queue does not go with --to=slurm"),
  ],
)
def test_flags_of_an_engine_from_outside_are_checked(engine, args, message):
  done = commands.run(*_SUBMIT, *args)
  assert done.code == 2
  assert message in done.err


def test_the_help_of_a_flag_says_which_engines_have_it(engine):
  known = engines.load()
  found = engines.flags(known)
  assert found["queue"].text(known) == "toy: Where the job waits."
  assert found["nodes"].text(known) == "The number of machines."
  assert "toy" not in found["cpus"].text(known)


def test_engines_that_share_a_flag_agree_on_its_type(engine):
  engine.write_text(_ENGINE.replace("queue: str", "cpus: str"))
  with pytest.raises(errors.ArgumentError, match="cpus of engine 'toy'"):
    engines.flags(engines.load())


def test_what_hides_its_code_is_refused(outside):
  """Its keys would be those of other code."""
  (outside / "toy_data.py").write_text(
    _DATASET + "\nimport functools\nhidden = functools.partial(load)\n"
  )
  with pytest.raises(errors.ArgumentError, match="must name a function"):
    registry.resolve("dataset", "toy_data:hidden", setting="data.name")


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("nothing", r"data.name must be one of \['adult', .*got 'nothing'"),
    (
      "no.such:thing",
      "data.name must be package.module:attribute .*No module named",
    ),
    ("json:nothing", "must be package.module:attribute .*nothing"),
  ],
)
def test_what_is_not_there_is_named(name, message):
  with pytest.raises(errors.ArgumentError, match=message):
    registry.resolve("dataset", name, setting="data.name")


def test_a_name_is_given_once():
  thing = np.zeros(0)
  with pytest.raises(ValueError, match="must be new, got 'digits'"):
    registry.register("dataset", "digits")(thing)


def _one(x):
  return x


def _other(x):
  return -x


class _Slotted:
  __slots__ = ("__dict__", "value")

  def __init__(self, value):
    self.value = value

  def __call__(self, x):
    return x * self.value


def _closed_over(value):
  return lambda x: x + value


@pytest.mark.parametrize(
  ("one", "other"),
  [
    (_one, _other),
    ([_one, _other], [_other, _one]),
    (_closed_over(jnp.ones(2)), _closed_over(jnp.zeros(2))),
    (_Slotted(1), _Slotted(2)),
    (functools.partial(_one, [1], [2]), functools.partial(_one, [2], [1])),
    (lambda x: x + 1, lambda x: x + 2),
  ],
  ids=["name", "order", "jax array", "slots", "arguments", "constant"],
)
def test_functions_of_one_file_are_told_apart(one, other):
  digests = {
    registry.code_sha256_of([thing], setting="map", needs_files=True)
    for thing in (one, other)
  }
  assert len(digests) == 2


def test_what_cannot_be_told_apart_is_named():
  thing = functools.partial(_one, jax.random.key(0))
  with pytest.raises(
    errors.ArgumentError, match="map must have functions that"
  ):
    registry.code_sha256_of([thing], setting="map", needs_files=True)


def test_one_thing_that_is_held_twice_is_not_two():
  x, y = [_one], [_other]
  digests = {
    registry.code_sha256_of(
      [functools.partial(_one, x, y, last)], setting="map", needs_files=True
    )
    for last in (x, y)
  }
  assert len(digests) == 2

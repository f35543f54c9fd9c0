"""The wheel, built and installed in an environment of its own."""

import json
import pathlib
import shutil
import sys
import zipfile

import pytest

from tests.support import installed

pytestmark = pytest.mark.slow

_STEPS = ("--config.privacy.num_steps=3", "--config.privacy.accountant=rdp")

_PROJECT = '''
"""What a user of dpdist writes, with types."""

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

import dpdist

Params = dict[str, jax.Array]


def init(key: jax.Array, example: dict[str, jax.Array]) -> Params:
  return {"w": jax.random.normal(key, example["x"].shape)}


def loss(
  params: Params, example: dict[str, jax.Array], rng: jax.Array
) -> tuple[jax.Array, None]:
  return jnp.square(params["w"] @ example["x"] - example["y"]), None


def metrics(
  params: Params, example: dict[str, jax.Array]
) -> dict[str, tuple[jax.Array, float]]:
  return {"mse": (jnp.square(params["w"] @ example["x"] - example["y"]), 1.0)}


privacy = dpdist.PrivacyConfig(
  num_examples=100, expected_batch_size=10, num_steps=5, l2_clip_norm=1.0,
  target_delta=1e-5, noise_multiplier=1.0,
)
plan = dpdist.make_plan(privacy)
epsilon: float = plan.epsilon()
spent: float = dpdist.accounting.epsilon(
  noise_multiplier=1.0, sampling_probability=0.1, num_steps=5, delta=1e-5
)
sampler = dpdist.PoissonSampler(
  num_examples=100, sampling_probability=0.1, seed=1
)
drawn: np.ndarray = sampler(0)
gradients = dpdist.clipped_grad(loss, l2_clip_norm=1.0)
task = dpdist.Task(init=init, loss=loss, metrics=metrics)
x = np.arange(360, dtype=np.float32).reshape(120, 3) / 360
y = x.sum(1)
dataset = dpdist.Dataset(
  train={"x": x[:100], "y": y[:100]}, test={"x": x[100:], "y": y[100:]}
)
other = dpdist.data.from_arrays({"x": x, "y": y}, test_fraction=0.5)


def main() -> None:
  config = dpdist.config.default()
  config.privacy.num_examples = 100
  config.privacy.expected_batch_size = 10.0
  config.privacy.num_steps = 2
  config.privacy.noise_multiplier = 1.0
  result = dpdist.train(
    config, "run", task=task, dataset=dataset, optimizer=optax.sgd(0.1)
  )
  print(result["epsilon"], dpdist.__version__, dpdist.errors.SettingsError)
'''
_MISTAKES = """
import dpdist

dpdist.make_plan(privacy=1)
dpdist.PrivacyConfig(num_examples="100")
epsilon: str = dpdist.accounting.epsilon(
  noise_multiplier=1.0, sampling_probability=0.1, num_steps=5, delta=1e-5
)
dpdist.gone
"""


@pytest.fixture(name="built", scope="module")
def fixture_built(tmp_path_factory):
  """The wheel of the tree, and that of the sdist of the tree."""
  folder = tmp_path_factory.mktemp("built")
  tree = installed.copy(folder / "tree")
  direct = installed.build(tree, folder / "tree_dist", "--wheel")
  shutil.rmtree(tree / "build")
  return direct, installed.build(tree, folder / "dist")


@pytest.fixture(name="programs", scope="module")
def fixture_programs(built, tmp_path_factory):
  return installed.install(tmp_path_factory.mktemp("environment"), built[1])


@pytest.fixture(name="elsewhere", scope="module")
def fixture_elsewhere(tmp_path_factory):
  return tmp_path_factory.mktemp("elsewhere")


def _files(wheel):
  with zipfile.ZipFile(wheel) as archive:
    return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_all_and_nothing_beside_dpdist(built):
  files = _files(built[1])
  tops = {name.partition("/")[0] for name in files}
  assert tops == {"dpdist", f"dpdist-{_version()}.dist-info"}
  inside = {
    path.relative_to(installed.ROOT).as_posix()
    for name in installed.FOLDERS
    for path in (installed.ROOT / name).rglob("*.py")
  }
  wanted = {x if x.startswith("dpdist/") else f"dpdist/{x}" for x in inside}
  assert {x for x in files if x.startswith("dpdist/")} == {
    *wanted,
    "dpdist/py.typed",
  }


def _version():
  code = "import dpdist; print(dpdist.__version__)"
  return installed.run(sys.executable, "-c", code, cwd=installed.ROOT).strip()


def test_the_sdist_makes_the_same_wheel(built):
  direct, wheel = map(_files, built)
  assert direct == wheel


def test_it_is_the_installed_one_that_runs(programs, elsewhere):
  code = "import dpdist; print(dpdist.__file__)"
  place = installed.run(programs / "python", "-c", code, cwd=elsewhere).strip()
  assert pathlib.Path(place).is_relative_to(programs.parent)
  for name in ("launch", "configs"):
    code = f"import {name}"
    said = installed.run(programs / "python", "-c", code, cwd=elsewhere, code=1)
    assert f"No module named '{name}'" in said


def test_help_and_wrong_words(programs, elsewhere):
  said = installed.run(programs / "dpdist", "--help", cwd=elsewhere)
  assert "\n  train    Trains a model" in said
  said = installed.run(programs / "dpdist", "verfy", cwd=elsewhere, code=2)
  assert "try: dpdist verify" in said
  wrong = ("--config=digit", "--workdir=none")
  said = installed.run(
    programs / "dpdist", "train", *wrong, cwd=elsewhere, code=2
  )
  assert "did you mean digits?" in said


def test_it_trains_by_name_and_verifies(programs, elsewhere):
  """As `dpdist local` does too, with the code that is installed."""
  dpdist = programs / "dpdist"
  train = ("--config=digits", "--workdir=run", *_STEPS)
  installed.run(dpdist, "train", *train, cwd=elsewhere)
  result = json.loads((elsewhere / "run" / "result.json").read_text())
  assert result["num_steps"] == 3
  said = installed.run(dpdist, "verify", "--workdir=run", cwd=elsewhere)
  assert "The record is sound." in said
  train = ("--config=digits", "--workdir=pair", *_STEPS)
  installed.run(
    dpdist, "local", "--num_processes=2", "--", *train, cwd=elsewhere
  )
  result = json.loads((elsewhere / "pair" / "result.json").read_text())
  assert result["num_steps"] == 3


def test_a_submitted_job_runs_what_is_installed(programs, elsewhere):
  said = installed.run(
    *(programs / "dpdist", "submit", "--to=slurm", "--dry_run"),
    *("--config=digits", "--workdir=/shared/digits"),
    "--config.privacy.accountant=rdp",
    cwd=elsewhere,
  )
  assert "-m dpdist.launch.train --config=digits" in said


def test_a_new_project_is_planned(programs, elsewhere):
  dpdist = programs / "dpdist"
  said = installed.run(dpdist, "init", "my_project", cwd=elsewhere)
  assert "try: dpdist train --config=my_project/config.py" in said
  config = "--config=my_project/config.py"
  said = installed.run(dpdist, "budget", config, cwd=elsewhere)
  assert "epsilon_planned" in said


def test_a_project_with_types_passes_strict_mypy(programs, elsewhere):
  (elsewhere / "project.py").write_text(_PROJECT)
  (elsewhere / "mistakes.py").write_text(_MISTAKES)
  mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable")
  mypy += (programs / "python",)
  said = installed.run(*mypy, "project.py", cwd=elsewhere)
  assert "Success: no issues found in 1 source file" in said
  said = installed.run(*mypy, "mistakes.py", cwd=elsewhere, code=1)
  lines = {line.split(":")[1] for line in said.splitlines()[:-1]}
  assert lines == {"4", "5", "6", "9"}, said
  installed.run(programs / "python", "project.py", cwd=elsewhere)


def test_an_editable_install_has_both_names(tmp_path):
  tree = installed.copy(tmp_path / "tree")
  # What `pip install -e` installs.
  code = "from setuptools import build_meta; build_meta.build_editable('dist')"
  installed.run(sys.executable, "-c", code, cwd=tree)
  (wheel,) = (tree / "dist").glob("*.whl")
  programs = installed.install(tmp_path / "environment", wheel)
  run = "--workdir=none"
  said = installed.run(programs / "dpdist", "verify", run, cwd=tmp_path, code=2)
  assert f"try: dpdist verify {run} --ledger=" in said
  python = (programs / "python", "-m")
  said = installed.run(*python, "launch.verify", run, cwd=tree, code=2)
  assert f"try: python -m launch.verify {run} --ledger=" in said
  said = installed.run(*python, "dpdist", "verify", run, cwd=tree, code=2)
  assert f"try: dpdist verify {run} --ledger=" in said

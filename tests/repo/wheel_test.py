"""The wheel, built and installed in an environment of its own.

What it needs is found in the environment of these tests, so that nothing is
downloaded; dpdist itself is not, nor is the checkout.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_OURS = ("dpdist", "launch", "configs")
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


def _copy(to):
  unwanted = shutil.ignore_patterns("__pycache__")
  for name in _OURS:
    shutil.copytree(_ROOT / name, to / name, ignore=unwanted)
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copy(_ROOT / name, to / name)
  return to


def _run(*words, cwd, code=0):
  hidden = ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV")
  done = subprocess.run(
    [str(word) for word in words],
    cwd=cwd,
    env={k: x for k, x in os.environ.items() if k not in hidden},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout + done.stderr


@pytest.fixture(name="built", scope="module")
def fixture_built(tmp_path_factory):
  """The wheel of the tree, and that of the sdist of the tree."""
  folder = tmp_path_factory.mktemp("built")
  tree = _copy(folder / "tree")
  build = (sys.executable, "-m", "build", "--no-isolation", tree)
  _run(*build, "--wheel", f"--outdir={folder / 'tree_dist'}", cwd=folder)
  shutil.rmtree(tree / "build")
  _run(*build, f"--outdir={folder / 'dist'}", cwd=folder)
  (direct,) = (folder / "tree_dist").glob("*.whl")
  (wheel,) = (folder / "dist").glob("*.whl")
  return direct, wheel


def _environment(folder, wheel):
  """A new environment in which pip has installed a wheel."""
  venv.create(folder, symlinks=True)
  python = folder / "bin" / "python"
  _run(
    *(sys.executable, "-m", "pip", "--python", python, "install", "--no-index"),
    *("--no-deps", "--quiet", wheel),
    cwd=folder,
  )
  (packages,) = folder.glob("lib/python*/site-packages")
  # After dpdist's own place, so that no other dpdist is found first. Files
  # there that make paths known, as of an editable install, are not read.
  paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
  (packages / "zz_others.pth").write_text("\n".join(paths))
  return folder / "bin"


@pytest.fixture(name="programs", scope="module")
def fixture_programs(built, tmp_path_factory):
  return _environment(tmp_path_factory.mktemp("environment"), built[1])


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
    path.relative_to(_ROOT).as_posix()
    for name in _OURS
    for path in (_ROOT / name).rglob("*.py")
  }
  wanted = {x if x.startswith("dpdist/") else f"dpdist/{x}" for x in inside}
  assert {x for x in files if x.startswith("dpdist/")} == {
    *wanted,
    "dpdist/py.typed",
  }


def _version():
  code = "import dpdist; print(dpdist.__version__)"
  return _run(sys.executable, "-c", code, cwd=_ROOT).strip()


def test_the_sdist_makes_the_same_wheel(built):
  direct, wheel = map(_files, built)
  assert direct == wheel


def test_it_is_the_installed_one_that_runs(programs, elsewhere):
  code = "import dpdist; print(dpdist.__file__)"
  place = _run(programs / "python", "-c", code, cwd=elsewhere).strip()
  assert pathlib.Path(place).is_relative_to(programs.parent)
  for name in ("launch", "configs"):
    code = f"import {name}"
    said = _run(programs / "python", "-c", code, cwd=elsewhere, code=1)
    assert f"No module named '{name}'" in said


def test_help_and_wrong_words(programs, elsewhere):
  said = _run(programs / "dpdist", "--help", cwd=elsewhere)
  assert "\n  train    Trains a model" in said
  said = _run(programs / "dpdist", "verfy", cwd=elsewhere, code=2)
  assert "try: dpdist verify" in said
  wrong = ("--config=digit", "--workdir=none")
  said = _run(programs / "dpdist", "train", *wrong, cwd=elsewhere, code=2)
  assert "did you mean digits?" in said


def test_it_trains_by_name_and_verifies(programs, elsewhere):
  """As `dpdist local` does too, with the code that is installed."""
  dpdist = programs / "dpdist"
  train = ("--config=digits", "--workdir=run", *_STEPS)
  _run(dpdist, "train", *train, cwd=elsewhere)
  result = json.loads((elsewhere / "run" / "result.json").read_text())
  assert result["num_steps"] == 3
  said = _run(dpdist, "verify", "--workdir=run", cwd=elsewhere)
  assert "The record is sound." in said
  train = ("--config=digits", "--workdir=pair", *_STEPS)
  _run(dpdist, "local", "--num_processes=2", "--", *train, cwd=elsewhere)
  result = json.loads((elsewhere / "pair" / "result.json").read_text())
  assert result["num_steps"] == 3


def test_a_submitted_job_runs_what_is_installed(programs, elsewhere):
  said = _run(
    *(programs / "dpdist", "submit", "--to=slurm", "--dry_run"),
    *("--config=digits", "--workdir=/shared/digits"),
    "--config.privacy.accountant=rdp",
    cwd=elsewhere,
  )
  assert "-m dpdist.launch.train --config=digits" in said


def test_a_new_project_is_planned(programs, elsewhere):
  dpdist = programs / "dpdist"
  said = _run(dpdist, "init", "my_project", cwd=elsewhere)
  assert "try: dpdist train --config=my_project/config.py" in said
  config = "--config=my_project/config.py"
  said = _run(dpdist, "budget", config, cwd=elsewhere)
  assert "epsilon_planned" in said


def test_a_project_with_types_passes_strict_mypy(programs, elsewhere):
  (elsewhere / "project.py").write_text(_PROJECT)
  (elsewhere / "mistakes.py").write_text(_MISTAKES)
  mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable")
  mypy += (programs / "python",)
  said = _run(*mypy, "project.py", cwd=elsewhere)
  assert "Success: no issues found in 1 source file" in said
  said = _run(*mypy, "mistakes.py", cwd=elsewhere, code=1)
  lines = {line.split(":")[1] for line in said.splitlines()[:-1]}
  assert lines == {"4", "5", "6", "9"}, said
  _run(programs / "python", "project.py", cwd=elsewhere)


def test_an_editable_install_has_both_names(tmp_path):
  tree = _copy(tmp_path / "tree")
  # What `pip install -e` installs.
  code = "from setuptools import build_meta; build_meta.build_editable('dist')"
  _run(sys.executable, "-c", code, cwd=tree)
  (wheel,) = (tree / "dist").glob("*.whl")
  programs = _environment(tmp_path / "environment", wheel)
  run = "--workdir=none"
  said = _run(programs / "dpdist", "verify", run, cwd=tmp_path, code=2)
  assert f"try: dpdist train --config=digits {run}" in said
  python = (programs / "python", "-m")
  said = _run(*python, "launch.verify", run, cwd=tree, code=2)
  assert f"try: python -m launch.train --config=digits {run}" in said
  said = _run(*python, "dpdist", "verify", run, cwd=tree, code=2)
  assert f"try: dpdist train --config=digits {run}" in said

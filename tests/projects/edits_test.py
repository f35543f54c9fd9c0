"""One-line edits of a user's project: what alters a release opens a branch.

A run goes on under its keys only if its fingerprint is the same. Here that is
computed as a run does, without training.
"""

from collections.abc import Iterator
import os
import pathlib
import sys

import pytest

from dpdist import registry
from dpdist.tasks import parts as parts_lib
from dpdist.training import abstract_step
from dpdist.training import parameters
from dpdist.training import setup
from dpdist.workdir import fingerprint
from launch.cli import config_parts
from tests.support import turns

pytestmark = pytest.mark.usefixtures("quick_compiles")

_FILES = {
  "project.py": '''
"""Prices of houses."""
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cleaning
import dpdist

HERE = pathlib.Path(__file__).parent
TOWNS = (HERE / "towns.txt").read_text().split()
OFFSET = np.array([0.0, 1.0], np.float32)


def get_config():
  config = dpdist.config.default()
  config.privacy.num_examples = 60
  config.privacy.expected_batch_size = 16.0
  config.privacy.num_steps = 4
  config.privacy.noise_multiplier = 2.0
  config.privacy.accountant = "rdp"
  config.insecure_seed = 1
  config.eval_every = 4
  config.checkpoint_every = 2
  return config


def init(key, example):
  return {"w": 0.1 * jax.random.normal(key, (3, 2)), "b": jnp.zeros(2)}


def predict(params, example):
  return jnp.tanh(example["x"] @ params["w"]) + params["b"]


def loss(params, example, rng):
  error = predict(params, example) - example["y"] - OFFSET
  kept = jax.random.bernoulli(rng, 0.9, error.shape)
  return jnp.mean((kept * error) ** 2), None


def metrics(params, example):
  error = predict(params, example) - example["y"]
  return {"mse": (jnp.mean(error**2), 1.0)}


def get_task(config):
  return dpdist.Task(init=init, loss=loss, metrics=metrics)


def to_arrays(row):
  x = [row["size"], TOWNS.index(row["town"]), cleaning.years(row["age"])]
  return {"x": np.array(x, np.float32), "y": np.float32(row["price"])}


def get_dataset(config):
  return dpdist.data.from_csv(
    HERE / "rows.csv", test=HERE / "held_out.csv", text=["town"], map=to_arrays
  )


def get_optimizer(config):
  return optax.sgd(cleaning.RATE, momentum=0.9)
''',
  "cleaning.py": """
import scales

RATE = 0.1


def years(age):
  return age / scales.CENTURY
""",
  "scales.py": "CENTURY = 100.0  # Years.\n",
  "notes.py": "THOUGHT = 1\n",
  "README.md": "# Houses\n",
  "towns.txt": "north\nsouth\nwest\n",
  "rows.csv": "size,town,age,price\n"
  + "".join(
    f"{i % 7},{'south' if i % 2 else 'west'},{i},1\n" for i in range(60)
  ),
  "held_out.csv": "size,town,age,price\n"
  + "".join(f"{i % 5},south,{i},2\n" for i in range(8)),
}

# The file, what is edited, and whether the run must go on under other keys. An
# edit of a file of code may do so too where it alters nothing: None.
_EDITS = {
  "the power of the loss": ("project.py", "error) ** 2)", "error) ** 4)", True),
  "a sign": (
    "project.py",
    '- example["y"] - OFF',
    '+ example["y"] - OFF',
    True,
  ),
  "a constant array": ("project.py", "[0.0, 1.0]", "[0.0, 1.5]", True),
  "the dropout": ("project.py", "rng, 0.9", "rng, 0.8", True),
  "the initial scale": ("project.py", "0.1 * jax", "0.2 * jax", True),
  "the initial bias": ("project.py", "jnp.zeros(2)", "jnp.ones(2)", True),
  "the activation": ("project.py", "jnp.tanh", "jnp.sin", True),
  "the momentum": ("project.py", "momentum=0.9", "momentum=0.8", True),
  "the optimizer": ("project.py", "optax.sgd(cl", "optax.rmsprop(cl", True),
  "a rate elsewhere": ("cleaning.py", "RATE = 0.1", "RATE = 0.2", True),
  "a scale elsewhere": ("cleaning.py", "age /", "age *", True),
  "a number that is imported twice": ("scales.py", "100.0", "10.0", True),
  "what is read": ("project.py", 'row["size"],', 'row["age"],', True),
  "the target": ("project.py", '(row["price"])', '(row["size"])', True),
  "a list in a file": ("towns.txt", "north\nsouth", "south\nnorth", True),
  "a value of a row": ("rows.csv", "3,south,3,1", "3,south,3,2", True),
  "the order of rows": (
    *("rows.csv", "1,south,1,1\n2,west,2,1", "2,west,2,1\n1,south,1,1", True),
  ),
  "the noise": ("project.py", "multiplier = 2.0", "multiplier = 2.5", True),
  "the batch": ("project.py", "size = 16.0", "size = 20.0", True),
  "the steps": ("project.py", "num_steps = 4", "num_steps = 5", True),
  "the seed": ("project.py", "seed = 1", "seed = 2", True),
  "which file is read": ("project.py", '"rows.csv"', '"held_out.csv"', True),
  "a comment": ("project.py", "def init", "# First.\ndef init", None),
  "a docstring": ("project.py", "Prices of houses", "What they cost", None),
  "a variable's name": ("project.py", "kept", "remaining", None),
  "a metric": (
    "project.py",
    "jnp.mean(error**2), 1",
    "jnp.max(error), 1",
    None,
  ),
  "a comment elsewhere": ("scales.py", "Years", "In years", None),
  "how often is saved": (
    *("project.py", "checkpoint_every = 2", "checkpoint_every = 1", None),
  ),
  "a page": ("README.md", "Houses", "Prices", False),
  "code that nothing imports": ("notes.py", "1", "2", False),
  "a held-out row": ("held_out.csv", "3,south,3,2", "3,south,3,1", False),
  "nothing": ("README.md", "", "", False),
}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
  """Leaves no module of a project behind."""
  yield
  _forget()


def _forget() -> None:
  config_parts._module.cache_clear()
  for name in ("cleaning", "scales", "config_file_project"):
    sys.modules.pop(name, None)
    registry._digests.pop(name, None)


def _written(folder: pathlib.Path, **changed: str) -> pathlib.Path:
  folder.mkdir(parents=True)
  for name, text in (_FILES | changed).items():
    (folder / name).write_text(text)
    # Before this process began, as where a user starts one anew.
    os.utime(folder / name, (1, 1))
  return folder


def _fingerprint(folder: pathlib.Path) -> str:
  """Returns the fingerprint of a run of the project in a folder."""
  _forget()
  sys.path.insert(0, str(folder))
  try:
    module = config_parts._module(folder / "project.py")
    config = module.get_config()
    given = parts_lib.of(
      module.get_task(config),
      module.get_dataset(config),
      module.get_optimizer(config),
    )
    experiment = setup.build(given.settings(config), parts=given)
    source = experiment.dataset.train
    row = abstract_step.unit(config, abstract_step.example(experiment))
    start = parameters.of(experiment.task, setup.PUBLIC_KEY_DATA, row)
    lowered = abstract_step.lowered_sha256(
      abstract_step.programs(
        experiment.step,
        start.initializer(experiment.step),
        row=row,
        chunk_size=experiment.chunk_size,
        frozen=None,
        has_schedule=False,
        is_watched=False,
      )
    )
    return fingerprint.fingerprint(
      config.to_dict(),
      experiment.plan.fingerprint(),
      source.content_digest(),
      [],
      given.code_sha256(config) | {"lowered_sha256": lowered},
    )
  finally:
    sys.path.remove(str(folder))


@pytest.fixture(name="before", scope="module")
def fixture_before(tmp_path_factory: pytest.TempPathFactory) -> str:
  """The fingerprint before any edit."""
  return _fingerprint(_written(tmp_path_factory.mktemp("before") / "project"))


def test_there_are_thirty_edits_and_each_is_of_the_project() -> None:
  assert len(_EDITS) >= 30
  for file, old, new, _ in _EDITS.values():
    assert old in _FILES[file]
    assert old != new or not old


@pytest.mark.parametrize(
  "edit",
  turns.cells(
    _EDITS,
    always=("a number that is imported twice", "a list in a file"),
  ),
)
def test_what_alters_a_release_opens_a_branch(
  before: str, tmp_path: pathlib.Path, edit: str
) -> None:
  file, old, new, is_altered = _EDITS[edit]
  text = _FILES[file].replace(old, new) if old else _FILES[file]
  after = _fingerprint(_written(tmp_path / "after", **{file: text}))
  if is_altered is not None:
    assert (before != after) == is_altered

"""Users' projects, each in one short file, from training to a loaded model."""

import csv
import pathlib
import shutil

import jax
import numpy as np
from PIL import Image
import pytest
from sklearn import metrics

import dpdist
from tests.support import projects

_ROWS = 512


@pytest.mark.parametrize("name", ["house_prices", "image_tags"])
def test_a_project_is_short(name: str) -> None:
  assert projects.num_lines(projects.PROJECTS / f"{name}.py") <= 60


def _copied(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Puts a project into a directory of its user's."""
  folder.mkdir()
  return pathlib.Path(shutil.copy(projects.PROJECTS / f"{name}.py", folder))


def _write(path: pathlib.Path, rows: list[list[object]]) -> None:
  with path.open("w", newline="") as file:
    csv.writer(file).writerows(rows)


def _write_houses(path: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  rows: list[list[object]] = [["size", "age", "town", "price"]]
  for _ in range(_ROWS):
    size, age = rng.normal(100, 30), rng.uniform(0, 80)
    town = rng.integers(3)
    price = (size - 100) / 30 - (age - 40) / 40 + [0.0, 0.5, -0.5][town]
    name = ("north", "south", "west")[town]
    rows.append([f"{size:.3f}", f"{age:.3f}", name, f"{price:.4f}"])
  _write(path, rows)


def _write_images(folder: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  for part, size in (("train", 240), ("test", 60)):
    rows: list[list[object]] = [["image", "top", "left", "bright"]]
    (folder / part).mkdir(parents=True)
    for i in range(size):
      top, left, bright = rng.integers(0, 2, 3)
      pixels = rng.integers(0, 60, (8, 8)) + 90 * bright
      pixels[:4] += 60 * top
      pixels[:, :4] += 45 * left
      name = f"{part}/{i}.png"
      Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
      rows.append([name, top, left, bright])
    _write(folder / f"{part}.csv", rows)


@pytest.mark.slow
def test_regression_in_nnx_from_a_table(tmp_path: pathlib.Path) -> None:
  project = _copied("house_prices", tmp_path / "mine")
  _write_houses(project.with_name("houses.csv"))
  driven = projects.drive(project, tmp_path)
  module = projects.load(project)
  network = dpdist.tasks.with_params(module.Network, driven.params)
  data = module.get_dataset(module.get_config())
  test = data.test.read(np.arange(len(data.test)))
  predicted = jax.vmap(network)(test["inputs"])[:, 0]
  scores = driven.result["test"]
  assert list(scores) == ["r2", "mae"]
  np.testing.assert_allclose(
    [*scores.values()],
    [
      metrics.r2_score(test["targets"], predicted),
      metrics.mean_absolute_error(test["targets"], predicted),
    ],
    rtol=1e-4,
  )
  assert scores["r2"] > 0.3
  assert not driven.result["held_out_problem"]


@pytest.mark.slow
def test_tags_of_images_in_equinox(tmp_path: pathlib.Path) -> None:
  project = _copied("image_tags", tmp_path / "mine")
  _write_images(project.with_name("images"))
  driven = projects.drive(project, tmp_path)
  assert driven.said.count("BatchNorm was replaced by GroupNorm") == 1
  module = projects.load(project)
  network = dpdist.tasks.with_params(module.Network, driven.params, fix=True)
  data = module.get_dataset(module.get_config())
  test = data.test.read(np.arange(len(data.test)))
  logits, targets = jax.vmap(network)(test["inputs"]), test["targets"]
  scores = driven.result["test"]
  assert list(scores) == ["average_precision", "auc", "f1", "loss"]
  np.testing.assert_allclose(
    [*scores.values()][:3],
    [
      metrics.average_precision_score(targets, logits, average="macro"),
      metrics.roc_auc_score(targets, logits, average="macro"),
      metrics.f1_score(targets, logits > 0, average="macro"),
    ],
    rtol=1e-4,
  )
  assert scores["auc"] > 0.7
  tables = driven.result["test_tables"]["per_class"]
  assert [row["support"] for row in tables] == targets.sum(0).tolist()
  assert set(driven.result["test_ema"]) == set(scores)

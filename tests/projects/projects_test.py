"""Users' projects, each in one short file, driven from an installed wheel."""

import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from dpdist.reporting import metrics
from tests.projects import made_up
from tests.support import installed
from tests.support import projects


@pytest.mark.parametrize("name", made_up.NAMES)
def test_a_project_is_short(name: str) -> None:
  assert projects.num_lines(projects.PROJECTS / f"{name}.py") <= 60


@pytest.fixture(name="programs", scope="module")
def fixture_programs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Where the programs of the installed wheel are."""
  folder = tmp_path_factory.mktemp("installed")
  tree = installed.copy(folder / "tree")
  wheel = installed.build(tree, folder / "dist", "--wheel")
  return installed.install(folder / "environment", wheel)


def _driven(
  programs: pathlib.Path, folder: pathlib.Path, name: str, use: str, **more: Any
) -> projects.Driven:
  """Puts a project into a directory of its user's, and drives it."""
  mine = folder / "mine"
  mine.mkdir()
  project = pathlib.Path(shutil.copy(projects.PROJECTS / f"{name}.py", mine))
  if name in made_up.NAMES:
    made_up.write(name, mine)
  return projects.Driver(programs, project).drive(use, **more)


def _assert_same(used: dict[str, Any], scores: dict[str, Any]) -> None:
  for name, value in used.items():
    np.testing.assert_allclose(scores[name], value, rtol=1e-4, err_msg=name)


_HOUSES = """
network = dpdist.tasks.with_params(project.Network, params)
found = jax.vmap(network)(test["inputs"])[:, 0]
scores = {
  "r2": sk.r2_score(test["targets"], found),
  "mae": sk.mean_absolute_error(test["targets"], found),
}
"""


@pytest.mark.slow
def test_regression_in_nnx_from_a_table(
  programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  driven = _driven(programs, tmp_path, "house_prices", _HOUSES, is_exact=False)
  scores = driven.result["test"]
  assert list(scores) == ["r2", "mae"]
  _assert_same(driven.used, scores)
  assert scores["r2"] > 0.3
  assert not driven.result["held_out_problem"]


_TAGS = """
network = dpdist.tasks.with_params(project.Network, params, fix=True)
logits, targets = jax.vmap(network)(test["inputs"]), test["targets"]
scores = {
  "average_precision": sk.average_precision_score(targets, logits),
  "auc": sk.roc_auc_score(targets, logits),
  "f1": sk.f1_score(targets, logits > 0, average="macro"),
}
"""


@pytest.mark.slow
def test_tags_of_images_in_equinox(
  programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  driven = _driven(programs, tmp_path, "image_tags", _TAGS, is_exact=True)
  assert driven.said.count("BatchNorm was replaced by GroupNorm") == 1
  scores = driven.result["test"]
  assert list(scores) == ["average_precision", "auc", "f1", "loss"]
  _assert_same(driven.used, scores)
  assert scores["auc"] > 0.7
  tables = driven.result["test_tables"]["per_class"]
  assert len(tables) == 3
  assert set(driven.result["test_ema"]) == set(scores)


_MESSAGES = """
tag = lambda words: project.Tagger().apply({"params": params}, words)
logits = jax.vmap(tag)(test["inputs"])
is_word = test["targets"] >= 0
is_right = logits.argmax(-1) == test["targets"]
base = dict(np.load("base.npz"))
assert (params["tags"]["base"]["kernel"] == base["tags/base/kernel"]).all()
scores = {"accuracy": is_right[is_word].mean()}
"""


@pytest.mark.slow
def test_adapters_of_a_tagger_for_users_in_linen(
  programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  driven = _driven(programs, tmp_path, "tagger", _MESSAGES, is_exact=True)
  scores = driven.result["test"]
  _assert_same(driven.used, scores)
  assert scores["accuracy"] > 0.8
  assert "add_or_remove_one, of one user" in driven.said


_PURCHASES = """
of = lambda part, name: jax.vmap(jax.vmap(
  dpdist.tasks.with_params(project.Tower, params[part])
))(test[name])
unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
seen, bought, others = map(unit, (
  of("inputs", "inputs"), of("targets", "targets"), of("targets", "popular")
))
hits = []
for i, is_pair in enumerate(test["is_pair"]):
  items = np.concatenate([bought[i][is_pair], others[i]])
  nearest = (seen[i][is_pair] @ items.T).argmax(-1)
  hits.append(np.mean(nearest == np.arange(is_pair.sum())))
scores = {"accuracy": np.mean(hits)}
"""


@pytest.mark.slow
def test_a_recommender_of_two_towers_in_nnx(
  programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  driven = _driven(programs, tmp_path, "recommender", _PURCHASES, is_exact=True)
  scores = driven.result["test"]
  assert list(scores) == ["accuracy", "loss"]
  assert scores["accuracy"] > 0.3
  assert driven.used["accuracy"] > 0.3


_PATIENTS = """
found = jax.vmap(project._log_scale, (None, 0))(params, test)
scores = {"concordance": project.concordance(test["targets"], found)}
"""


@pytest.mark.slow
def test_survival_in_plain_jax(
  programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  driven = _driven(programs, tmp_path, "survival", _PATIENTS, is_exact=False)
  _assert_same(driven.used, driven.result["test"])
  assert driven.result["test"]["concordance"] > 0.7


@pytest.mark.slow
def test_a_project_that_calls_train_itself(
  programs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  driven = _driven(
    programs,
    tmp_path,
    "regression",
    'scores = {"features": len(params["hidden"])}',
    is_exact=False,
    command=("python", "regression.py"),
  )
  result = driven.result
  assert result["num_steps"] == 24
  assert set(result["test"]) == {"weighted_mse", "mae"}
  assert result["test"]["mae"] < 0.6
  rows = metrics.read(driven.workdir)
  assert set(rows[-1]) == {
    *("step", "epsilon", "noisy_gradient_norm", "noise_norm"),
    *("test/weighted_mse", "test/mae", "test_ema/weighted_mse"),
    "test_ema/mae",
  }
  assert driven.used["features"] == 6

"""A loop of one's own over users and groups: what is clipped as one."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist.data import arrays as arrays_lib
from dpdist.data import users as users_lib
from dpdist.ledger import ledger as ledger_lib
from dpdist.workdir import verify

pytestmark = pytest.mark.usefixtures("quick_compiles")

_C = 0.5
# Whose each of the eight examples is: three users, one of whom has most.
_OWNERS = np.array([7, 9, 7, 7, 8, 7, 7, 7])
_ZERO_OUT = {"neighboring_relation": "zero_out"}
_X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def _loss(params, example, key):
  """Its gradient is the example."""
  del key
  return example["x"] @ params


def _config(**changes: Any) -> dpdist.PrivacyConfig:
  settings = {
    "num_examples": 3,
    "expected_batch_size": 3.0,  # All are drawn.
    "num_steps": 6,
    "l2_clip_norm": _C,
    "target_delta": 1e-3,
    "noise_multiplier": 1e-9,
    "accountant": "rdp",
    "unit": "user",
  }
  return dpdist.PrivacyConfig(**settings | changes)


def _session(workdir, config=None, **changes: Any) -> dpdist.Session:
  given = {
    "loss": _loss,
    "dataset": {"x": _X},
    "users": _OWNERS,
    "examples_per_unit": 6,
    "sentinel_every": 0,
  }
  return dpdist.Session(workdir, config or _config(), **given | changes)


def _clipped(gradient: np.ndarray) -> np.ndarray:
  return gradient * min(1, _C / np.linalg.norm(gradient))


def _first(session) -> np.ndarray:
  with session:
    return np.asarray(next(iter(session)).gradients(jnp.zeros(3)))


def test_groups_are_clipped_as_one_and_divided_by_their_number(tmp_path):
  config = _config(
    **{"unit": "example", "num_examples": 8, "expected_batch_size": 8.0},
    **{"group_size": 3} | _ZERO_OUT,
  )
  session = _session(tmp_path, config, users=None, examples_per_unit=0)
  found = _first(session)
  groups = [_X[i : i + 3].mean(axis=0) for i in (0, 3, 6)]
  np.testing.assert_allclose(
    found * 8 / 3, sum(map(_clipped, groups)), rtol=1e-5, atol=1e-6
  )


def _steps(workdir, stop_at: int) -> list[np.ndarray]:
  """The sums of steps, before an end as by a kill."""
  session = _session(workdir, examples_per_unit=2, checkpoint_every=6)
  session.__enter__()
  found = []
  for step in session:
    found.append(3 * np.asarray(step.gradients(jnp.zeros(3))))
    if step.number + 1 == stop_at:
      break
  session._stack.close()
  return found


def test_some_of_a_users_examples_are_clipped_as_one_and_chosen_anew(tmp_path):
  one, again = _steps(tmp_path, 4), _steps(tmp_path, 6)
  others = _clipped(_X[4]) + _clipped(_X[1])
  pairs = list(itertools.combinations(np.flatnonzero(_OWNERS == 7), 2))
  means = np.stack([_clipped(_X[list(pair)].mean(axis=0)) for pair in pairs])
  chosen = set()
  for total in again:
    (index,) = np.flatnonzero(np.abs(total - others - means).max(1) < 1e-5)
    chosen.add(pairs[index])
  assert len(chosen) > 1
  # Of those that were made before, the same are used again.
  np.testing.assert_array_equal(one, again[:4])
  with ledger_lib.Ledger(tmp_path / "ledger") as ledger:
    assert len(ledger.branches) == 1
    assert ledger.spent_steps == 6
    assert not any(x.problem for x in verify.verify(tmp_path, ledger))


def test_users_come_from_a_data_set_or_a_source_too(tmp_path):
  test = {"x": _X[:2]}
  whole = dpdist.Dataset({"x": _X}, test, _OWNERS, np.array([1, 2]))
  source = users_lib.UserSource(
    arrays_lib.ArraySource({"x": _X}), _OWNERS - 7, 3, 6
  )
  right = _session(tmp_path)
  for dataset, slots in (whole, 6), (source, 0):
    session = _session(
      tmp_path, dataset=dataset, users=None, examples_per_unit=slots
    )
    assert session._source.content_digest() == right._source.content_digest()
    with pytest.raises(ValueError, match="users must be left out for a data"):
      _session(tmp_path, dataset=dataset)


@pytest.mark.parametrize(
  ("changes", "config", "message"),
  [
    ({"users": None}, {}, "examples_per_unit must be at least 1 where"),
    ({"examples_per_unit": 0}, {}, "examples_per_unit must be at least 1 whe"),
    ({"users": _OWNERS[1:]}, {}, "users must say of each of the 8 examples"),
    ({}, {"num_examples": 4}, "num_examples must be the number of users, 3"),
    ({}, {"unit": "example"}, "unit must be 'user' where users have the"),
    (
      {},
      {"group_size": 2} | _ZERO_OUT,
      "group_size must be 1 where users have the exam",
    ),
    (
      {"dataset": None, "users": None, "data_digest": "d" * 64},
      {},
      "examples_per_unit must be 0 without a dataset",
    ),
    (
      {"dataset": None, "data_digest": "d" * 64, "users": None}
      | {"examples_per_unit": 0},
      {"group_size": 2} | _ZERO_OUT,
      "group_size must be 1 without a dataset",
    ),
  ],
)
def test_what_is_no_unit_is_refused(tmp_path, changes, config, message):
  with pytest.raises(ValueError, match=message):
    _session(tmp_path, _config(**config), **changes)
  assert not list(tmp_path.iterdir())

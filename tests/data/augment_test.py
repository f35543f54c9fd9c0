"""Changed copies of an image are averaged, and clipped as one example."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from dpdist import config as config_lib
from dpdist.data import augment
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism
from dpdist.privacy import plan as plan_lib
from dpdist.tasks import per_unit
from dpdist.training import step as step_lib

pytestmark = pytest.mark.usefixtures("quick_compiles")

_CROP, _COPIES, _ROWS, _CLIP = 2, 3, 16, 0.2
_SHAPE = (4, 5, 2)


def _windows(image):
  """All that a change may make of an image, in NumPy."""
  found = []
  for flipped in (image, image[:, ::-1]):
    padded = np.pad(
      flipped, [(_CROP, _CROP), (_CROP, _CROP), (0, 0)], "reflect"
    )
    for i, j in np.ndindex(2 * _CROP + 1, 2 * _CROP + 1):
      found.append(padded[i : i + image.shape[0], j : j + image.shape[1]])
  return np.stack(found)


def _change():
  return augment.flip_and_crop(flip=True, crop=_CROP)


def test_every_shift_and_flip_occurs_and_nothing_else():
  image = np.random.default_rng(0).random(_SHAPE, np.float32)
  keys = jax.random.split(jax.random.key(0), 1000)
  got = np.asarray(jax.jit(jax.vmap(_change(), (0, None)))(keys, image))
  windows = _windows(image)
  same = (got[:, None] == windows).all((2, 3, 4))
  assert same.any(1).all()
  counts = same.sum(0)
  # 50 of them, 20 times each; a count of 0 has a chance of 1e-7.
  assert counts.min() > 0
  assert counts.max() < 60


def test_nothing_asked_for_changes_nothing():
  image = np.random.default_rng(0).random(_SHAPE, np.float32)
  same = augment.flip_and_crop(flip=False, crop=0)(jax.random.key(0), image)
  np.testing.assert_array_equal(same, image)


def _loss(params, example, rng):
  del rng
  return jnp.tanh(jnp.sum(params * example["inputs"])) * example[
    "targets"
  ], None


@functools.cache
def _step(num_devices):
  plan = plan_lib.make_plan(
    plan_lib.PrivacyConfig(
      num_examples=100,
      expected_batch_size=_ROWS,
      num_steps=2,
      l2_clip_norm=_CLIP,
      noise_multiplier=1.0,
      target_delta=1e-5,
    )
  )
  loss = per_unit.mean_over_copies(_loss, _change(), _COPIES)
  mesh = mesh_lib.make(
    ml_collections.ConfigDict({"data": num_devices, "fsdp": 1, "model": 1}),
  )
  return step_lib.Step(mechanism.make(plan, loss), optax.sgd(1.0), mesh)


def test_the_mean_over_copies_is_clipped_once_on_eight_devices():
  rng = np.random.default_rng(1)
  params = rng.normal(size=_SHAPE).astype(np.float32) / 4
  batch = {
    "inputs": rng.normal(size=(_ROWS, *_SHAPE)).astype(np.float32),
    "targets": rng.integers(1, 4, _ROWS).astype(np.float32),
  }
  is_padding = np.arange(_ROWS) % 5 == 3
  key, first_row = jax.random.key(7), 32
  step = _step(8)
  sharded = jax.device_put((batch, is_padding), mesh_lib.examples(step.mesh))
  got = step.accumulate(
    params, step.zeros(params), *sharded, key, first_row
  ).clipped_sum

  expected, shortened = np.zeros(_SHAPE), 0
  change = jax.jit(jax.vmap(_change(), (0, None)))
  for row in np.flatnonzero(~is_padding):
    # The example's own key: of its place in the step's list.
    own = jax.random.fold_in(key, first_row + row)
    keys = jax.random.split(jax.random.split(own)[0], _COPIES)
    copies = change(keys, batch["inputs"][row])
    slopes = []
    for copy in np.asarray(copies, np.float64):
      slope = 1 - np.tanh((params * copy).sum()) ** 2
      slopes.append(batch["targets"][row] * slope * copy)
    mean = np.mean(slopes, axis=0)
    norm = np.linalg.norm(mean)
    shortened += norm > _CLIP
    expected += mean * min(1, _CLIP / norm)
  assert shortened > 0
  np.testing.assert_allclose(np.sum(got, axis=0), expected, atol=1e-5)


@pytest.mark.parametrize(
  ("changes", "shape", "message"),
  [
    ({"multiplicity": -1}, _SHAPE, r"multiplicity must be at least 0, got -1"),
    ({"flip": True}, _SHAPE, r"multiplicity must be at least 1 with .*got 0"),
    ({"multiplicity": 2}, (8,), r"multiplicity must be 0 unless .*got 2"),
    ({"multiplicity": 2, "crop": 4}, _SHAPE, r"crop must be .* below 4.*got 4"),
  ],
)
def test_settings_without_sense_are_named(changes, shape, message):
  config = config_lib.default()
  config.augmentation.update(changes)
  with pytest.raises(ValueError, match=message):
    augment.check(config, shape)

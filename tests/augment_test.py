"""Changed copies of an example are averaged before its gradient is clipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpdist
from dpdist import augment
from dpdist import config as config_lib
from dpdist import job as job_lib
from dpdist import mechanism
from dpdist import mesh as mesh_lib
from dpdist import models
from dpdist import step as step_lib

_ROWS = 8
_COPIES = 3
_CLIP = 0.5
_PADDING = 5  # The row that is none, in the middle of the batch.


def _config(**changes):
  config = config_lib.default()
  config.model.name, config.model.num_outputs = "linear", 3
  config.augmentation.multiplicity = _COPIES
  config.augmentation.flip, config.augmentation.crop = True, 2
  config.update_from_flattened_dict(changes)
  return config


@functools.cache
def _batch():
  rng = np.random.default_rng(0)
  # Some gradients are longer than the clip norm, and some are not.
  size = np.geomspace(0.02, 2, _ROWS)[:, None, None, None]
  images = rng.normal(size=(_ROWS, 6, 4, 2)) * size
  images[_PADDING] = np.nan
  return {
    "inputs": images.astype(np.float32),
    "targets": rng.integers(0, 3, _ROWS, np.int32),
  }


_PARAMS = {"Dense_0": {"kernel": np.zeros((48, 3), np.float32)}}


@functools.cache
def _sum(num_devices):
  """The clipped sum of a step, as a run computes it."""
  config = _config()
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=_ROWS,
      expected_batch_size=_ROWS,
      num_steps=1,
      l2_clip_norm=_CLIP,
      target_delta=1e-5,
      noise_multiplier=1.0,
    )
  )
  mesh = mesh_lib.make(
    dict(zip(mesh_lib.AXES, (num_devices, 1, 1), strict=True)),
    jax.devices()[:num_devices],
  )
  loss = job_lib.loss_fn(config, models.make(config.model))
  step = step_lib.Step(mechanism.make(plan, loss), optax.sgd(1.0), mesh)
  put = lambda x: jax.device_put(x, mesh_lib.examples(mesh))
  params = step.placed(_PARAMS)
  total = step.accumulate(
    params,
    step.zeros(params),
    jax.tree.map(put, _batch()),
    put(np.arange(_ROWS) == _PADDING),
    jax.random.key(3),
    0,
  )
  return np.asarray(total.clipped_sum["Dense_0"]["kernel"]).sum(0)


def test_a_sum_is_of_clipped_means_over_copies():
  change = augment.flip_and_crop(flip=True, crop=2)

  @jax.jit
  def clipped(row, image, target):
    key = jax.random.split(jax.random.fold_in(jax.random.key(3), row))[0]

    def loss(kernel):
      # One copy after the other.
      total = 0.0
      for copy_key in jax.random.split(key, _COPIES):
        logits = change(copy_key, image).reshape(-1) @ kernel
        total -= jax.nn.log_softmax(logits)[target]
      return total / _COPIES

    grad = jax.grad(loss)(jnp.zeros((48, 3)))
    norm = jnp.linalg.norm(grad)
    return grad * jnp.minimum(1, _CLIP / norm), norm

  batch = _batch()
  rows = [row for row in range(_ROWS) if row != _PADDING]
  parts, norms = zip(
    *(clipped(r, batch["inputs"][r], batch["targets"][r]) for r in rows),
    strict=True,
  )
  assert min(norms) < _CLIP < max(norms)
  np.testing.assert_allclose(_sum(1), np.sum(parts, 0), rtol=1e-4, atol=1e-6)


def test_copies_are_the_same_on_eight_devices():
  np.testing.assert_allclose(_sum(8), _sum(1), rtol=1e-5, atol=1e-6)


def test_a_change_is_a_mirror_and_a_shift():
  image = np.arange(24, dtype=np.float32).reshape(4, 6, 1)
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect")
  shifts = [padded[i : i + 4, j : j + 6] for i in range(3) for j in range(3)]
  mirrored = np.pad(image[:, ::-1], ((1, 1), (1, 1), (0, 0)), mode="reflect")
  shifts += [mirrored[i : i + 4, j : j + 6] for i in range(3) for j in range(3)]
  change = augment.flip_and_crop(flip=True, crop=1)
  keys = jax.random.split(jax.random.key(0), 200)
  copies = np.asarray(jax.jit(jax.vmap(change, (0, None)))(keys, image))
  seen = {x.tobytes() for x in copies}
  assert seen == {x.tobytes() for x in map(np.ascontiguousarray, shifts)}


@pytest.mark.parametrize(
  ("changes", "shape", "message"),
  [
    (
      {"augmentation.multiplicity": 0},
      (4, 4, 1),
      "multiplicity must be at least 1 with .*flip or .*crop, got 0",
    ),
    (
      {"data.features": "scattering"},
      (2, 2, 81),
      "must be 0 with data.features='scattering', got 3",
    ),
    ({}, (16,), r"unless inputs are images .* inputs of shape \(16,\)"),
  ],
)
def test_what_cannot_be_changed_is_refused(changes, shape, message):
  job_lib._check_augmentation(_config(), (4, 4, 1))
  with pytest.raises(ValueError, match=message):
    job_lib._check_augmentation(_config(**changes), shape)

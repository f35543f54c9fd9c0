"""The compiled step on eight devices draws noise once, whatever its chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpdist
from dpdist.distributed import mesh as mesh_lib
from dpdist.mechanism import mechanism
from dpdist.training import step as step_lib

_ROWS = 8


@pytest.fixture(name="run", scope="module")
def fixture_run():
  """From padding flags of chunks to the parameters after a step."""
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=1000,
      expected_batch_size=8,
      num_steps=10,
      l2_clip_norm=1.0,
      target_delta=1e-5,
      noise_multiplier=1.5,
    )
  )
  # Of gradient zero, so that all that can be seen is noise.
  loss = lambda params, example, rng: (0.0 * jnp.dot(params, example), None)
  mesh = mesh_lib.make({"data": -1, "fsdp": 1, "model": 1})
  step = step_lib.Step(mechanism.make(plan, loss), optax.sgd(1.0), mesh)
  put = lambda x: jax.device_put(x, mesh_lib.examples(mesh))

  def run(*chunks):
    state = step.init(jnp.zeros(1000))
    accumulator = step.zeros(state.params)
    for i, is_padding_example in enumerate(chunks):
      accumulator = step.accumulate(
        state.params,
        accumulator,
        put(np.ones((_ROWS, 1000), np.float32)),
        put(is_padding_example),
        jax.random.key(0),
        i * _ROWS,
      )
    after, _ = step.apply(state, accumulator, jax.random.key(1))
    return np.asarray(after.params)

  return run


def test_neither_chunks_nor_examples_change_the_noise(run):
  real, padding = np.zeros(_ROWS, bool), np.ones(_ROWS, bool)
  alone = run()
  # 1.5 / 8; the standard error of 1000 draws is 2.2 %.
  assert 0.9 < np.std(alone) / (1.5 / 8) < 1.1
  for chunks in ([real], [real, real, real], [padding], [real, padding]):
    np.testing.assert_array_equal(run(*chunks), alone)

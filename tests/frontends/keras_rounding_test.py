"""The sums of a Keras model's chunks keep what float32 rounds away."""

import math

import jax
import numpy as np

import dpdist
from dpdist.frontends import keras as private_keras

# After the frontend, which chooses the backend.
keras = private_keras.keras

_CHUNK = 64


def test_a_keras_step_of_many_chunks_is_rounded_once(tmp_path):
  # Of a linear loss, so that each gradient is the example itself.
  inputs = keras.Input((1,))
  dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
  model = keras.Model(inputs, dense(inputs))
  model.compile(keras.optimizers.SGD(1.0), lambda y, out: out[..., 0])
  config = dpdist.PrivacyConfig(
    num_examples=4096,
    expected_batch_size=4096.0,
    num_steps=1,
    l2_clip_norm=1.0,
    target_delta=1e-6,
    noise_multiplier=1e-9,
    accountant="rdp",
  )
  private = private_keras.make_private(
    model,
    config,
    workdir=tmp_path,
    chunk_size=_CHUNK,
    devices=jax.devices()[:1],
  )
  # The second half is less than half of the sum's last bit in each chunk.
  rows = np.zeros((64, _CHUNK, 1), np.float32)
  rows[:32] = 1
  rows[32:, 0] = 2.0**-13 - 2.0**-20
  data, source = private._source(
    (rows.reshape(-1, 1), np.zeros(4096, np.float32), None), None, None
  )
  program, _ = private._program(data, source)
  step, state = program.step, program.state(0)
  total = step.begin(state)
  for part in rows:
    total = step.accumulate(
      *(state.params, total, {"[0]": part, "[1]": part[:, 0] * 0}),
      *(np.zeros(_CHUNK, bool), jax.random.key(0), 0),
    )
  exact = math.fsum(rows.ravel())
  assert exact - 2048 > 15 * np.spacing(np.float32(2048))
  ((high,), (low,)) = map(jax.tree.leaves, (total.clipped_sum, total.low))
  assert float(high[0, 0, 0]) == np.float32(exact)
  assert float(high[0, 0, 0]) + float(low[0, 0, 0]) == exact
  state, _ = step.apply(state, total, jax.random.key(1))
  (after,) = jax.tree.leaves(state.params)
  # 4096 is a power of two: the division rounds nothing, and noise is 1e-9.
  assert abs(float(after[0, 0]) * 4096 + exact) < 2.0**-12

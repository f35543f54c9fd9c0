"""What launch.bench measures here: what is compared, and what fits."""

import json

import jax
import numpy as np
import pytest

from configs import digits
from dpdist.profiling import autotune
from dpdist.profiling import measure
from dpdist.training import setup
from tests.support import commands

# Compiles a lot.
pytestmark = pytest.mark.slow


def _config(**changes):
  config = digits.get_config()
  config.model.width = 32
  config.privacy.noise_multiplier = 1.0
  config.privacy.target_epsilon = None
  config.privacy.expected_batch_size = 40
  config.chunk_size = 16
  config.ema_decay = 0.5
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def bench():
  return measure.prepare(_config())


@pytest.fixture(scope="module")
def facts(bench):
  return measure.compare(bench, rounds=2)


def test_a_step_is_its_chunks_and_its_update(facts):
  assert facts["chunks_per_step"] == 3
  assert facts["chunk_size"] == 16
  assert facts["parameters"] == 320
  for name in ("private", "ordinary"):
    found = facts[name]
    # Medians of two rounds are means, which add up.
    assert found["step_seconds"] == pytest.approx(
      3 * found["chunk_seconds"] + found["update_seconds"]
    )
    assert found["examples_per_second"] == pytest.approx(
      40 / found["step_seconds"]
    )
    assert found["bytes"] > 4 * facts["parameters"]
  assert facts["time_ratio"] > 0
  assert facts["memory_ratio"] == pytest.approx(
    facts["private"]["bytes"] / facts["ordinary"]["bytes"]
  )
  assert facts["fits"]
  json.dumps(facts, allow_nan=False)


def test_each_layer_and_its_rule_are_told(facts):
  text = "\n".join(facts["clipping"])
  assert "method: " in text
  assert "Dense_0']['kernel" in text


def test_the_ordinary_step_is_the_gradient_of_the_mean_loss(bench):
  chunk, update = measure._ordinary(bench)
  state = jax.tree.map(measure._made_up, bench.state)
  total = jax.tree.map(lambda x: 0 * x, state.params)
  rng = np.random.default_rng(0)
  batch = {
    "inputs": rng.normal(size=(16, 8, 8, 1)).astype(np.float32),
    "targets": rng.integers(0, 10, 16, np.int32),
  }
  key = jax.random.key(0)
  got = chunk(state.params, total, batch, key, None)
  grads = [
    jax.grad(
      lambda p, i=i: bench.loss_fn(
        p, {name: x[i] for name, x in batch.items()}, key
      )[0]
    )(state.params)
    for i in range(16)
  ]
  want = jax.tree.map(lambda *x: sum(x) / 16, *grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want
  )
  before = jax.tree.map(np.asarray, state.params)
  after = update(state, got)
  jax.tree.map(
    lambda old, new, g: np.testing.assert_allclose(
      new, old - 30.0 * g, rtol=1e-5, atol=1e-6
    ),
    before,
    after.params,
    want,
  )


@pytest.mark.parametrize(
  ("size", "used", "free", "said"),
  [
    (16, 8e9, 4e9, "take a smaller --config.chunk_size"),
    (16, 1e9, 4e9, "there is room for more: --autotune"),
    (16, 3e9, 4e9, "twice the size would not fit"),
    (64, 3e9, 4e9, "a larger one gains nothing"),
  ],
)
def test_advice_is_what_the_memory_allows(bench, facts, size, used, free, said):
  told = facts | {
    "chunk_size": size,
    "private": facts["private"] | {"bytes": used},
    "free_bytes": free,
  }
  assert said in " ".join(measure.advice(bench, told))


def test_a_chunk_that_holds_nearly_every_draw_is_that_of_a_run(bench):
  mesh = bench.step.mesh
  assert measure.most_useful(bench) == 64
  assert setup.chunk_size(bench.config, bench.plan, mesh) == 16


def test_the_largest_chunk_that_fits_is_found_by_trying(bench):
  whole = autotune.search(bench)
  assert whole["largest"] == 64
  assert whole["fastest"] in [8, 16, 32, 64]
  needed = {row["chunk_size"]: row["bytes"] for row in whole["tries"]}
  assert list(needed) == [8, 16, 32, 64]
  # Room for 40 and not for 48.
  limit = measure.trial(bench, 40)[0]
  found = autotune.search(bench, free_bytes=limit)
  assert found["largest"] == 40
  for row in found["tries"]:
    assert row["fits"] == (row["chunk_size"] <= 40)
    assert row["fits"] == (row["bytes"] <= limit)
    assert ("examples_per_second" in row) == row["fits"]
  none = autotune.search(bench, free_bytes=100)
  assert none["largest"] is none["fastest"] is None
  assert [row["chunk_size"] for row in none["tries"]] == [8]


def test_what_runs_out_of_memory_does_not_fit(bench, monkeypatch):
  def full(bench, size):
    if size > 16:
      # As XLA says it.
      jax.jit(lambda: jax.numpy.zeros((1 << 44,), np.float32))()
    return trial(bench, size)

  trial = measure.trial
  monkeypatch.setattr(measure, "trial", full)
  assert autotune.search(bench)["largest"] == 16


def test_exact_sums_are_not_measured():
  with pytest.raises(ValueError, match="exact_sum must be False"):
    measure.prepare(_config(**{"clipping.exact_sum": True}))


def test_settings_are_held_to_what_a_run_would_hold_them_to():
  with pytest.raises(ValueError, match=r"ema_decay must be .* got 1\.5"):
    measure.prepare(_config(ema_decay=1.5))


def test_rounds_must_be_at_least_one(bench):
  with pytest.raises(ValueError, match="rounds must be an integer >= 1, got 0"):
    measure.compare(bench, rounds=0)


_ARGS = (
  "--config=configs/digits.py",
  "--config.model.width=8",
  "--config.privacy.accountant=rdp",
  "--config.privacy.expected_batch_size=8",
)


def test_the_command_measures_here(tmp_path):
  done = commands.run("bench", *_ARGS, "--rounds=1")
  assert done.code == 0, done.err
  for text in ("private over ordinary", "How each layer is clipped", "Dense_0"):
    assert text in done.out


def test_the_command_tunes_here():
  done = commands.run("bench", *_ARGS, "--autotune", "--json")
  assert done.code == 0, done.err
  facts = json.loads(done.out)
  assert facts["largest"] == facts["tries"][-1]["chunk_size"] == 24
  done = commands.run("bench", *_ARGS, "--autotune", "--topology=v4:2x2x1")
  assert done.code == 2
  assert "without --topology" in done.err

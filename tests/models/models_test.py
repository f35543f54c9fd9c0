"""Models, their loss and their held-out metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpdist import config as config_lib
from dpdist import models
from dpdist.distributed import mesh as mesh_lib
from dpdist.tasks import cross_entropy
from dpdist.tasks import held_out

pytestmark = pytest.mark.usefixtures("quick_compiles")


def _make(**changes):
  config = config_lib.default().model
  config.update({"num_outputs": 10, "width": 8, "depth": 2, "num_heads": 2})
  if changes["name"] == "wide_resnet":
    config.update({"width": 1, "depth": 10, "num_groups": 4})
  config.update(changes)
  return models.make(config)


_INPUTS = {
  "linear": np.random.default_rng(2).random((2, 2, 12)).astype(np.float16),
  "wide_resnet": np.random.default_rng(3).random((8, 8, 3), np.float32),
  "random_features": np.random.default_rng(0).random((8, 8, 1), np.float32),
  "cnn": np.random.default_rng(1).random((28, 28, 1), np.float32),
  "decoder": np.arange(12, dtype=np.int32) % 10,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name == "wide_resnet"))
    for name in _INPUTS
  ],
)
def test_one_example_gives_logits_and_float32_parameters(name, dtype):
  model = _make(name=name, dtype=dtype)
  inputs = _INPUTS[name]

  @jax.jit
  def run(inputs):
    params = model.init(jax.random.key(0), inputs)["params"]
    return params, model.apply({"params": params}, inputs)

  params, logits = run(inputs)
  assert logits.shape == ((12, 10) if name == "decoder" else (10,))
  assert logits.dtype == jnp.dtype(dtype)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype("float32")
  }


def test_decoder_sees_only_the_past():
  model = _make(name="decoder")
  inputs = _INPUTS["decoder"]
  params = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
  other = inputs.copy()
  other[7] = (other[7] + 1) % 10
  apply = jax.jit(model.apply)
  a, b = (apply({"params": params}, x) for x in (inputs, other))
  np.testing.assert_array_equal(a[:7], b[:7])
  assert np.all(np.any(np.asarray(a != b), axis=1)[7:])


def test_random_features_are_constants():
  model = _make(name="random_features", width=64)
  inputs = _INPUTS["random_features"]
  shapes = jax.tree.map(
    jnp.shape, model.init(jax.random.key(0), inputs)["params"]
  )
  assert shapes == {"Dense_0": {"kernel": (64, 10)}}


def test_linear_normalises_groups_of_channels_of_one_example():
  inputs = _INPUTS["linear"].astype(np.float64)
  model = _make(name="linear", num_groups=4)
  params = {"Dense_0": {"kernel": jnp.eye(48)[:, :10]}}
  logits = model.apply({"params": params}, inputs)
  groups = inputs.reshape(2, 2, 4, 3)
  centred = groups - groups.mean((0, 1, 3), keepdims=True)
  expected = centred / groups.std((0, 1, 3), keepdims=True)
  np.testing.assert_allclose(logits, expected.ravel()[:10], rtol=2e-3)


def test_wide_resnet_has_the_layers_of_wrn_16_4():
  model = _make(name="wide_resnet", width=4, depth=16, num_groups=16)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((32, 32, 3)))
  sizes = {
    jax.tree_util.keystr(path): leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"])
  }
  # One at the start, two a block, three shortcuts.
  kernels = [n for n in sizes if "StandardizedConv" in n and "kernel" in n]
  assert len(kernels) == 1 + 6 * 2 + 3
  weights = 9 * 3 * 16
  channels, normalised = [16], [256]
  for before, after in ((16, 64), (64, 128), (128, 256)):
    weights += before * after + 9 * before * after + 3 * 9 * after**2
    channels += [after] * 5
    normalised += [before, before, after, after, after]
  # A gain and a bias, a scale and an offset; then ten classes.
  expected = weights + 2 * sum(channels) + 2 * sum(normalised) + 256 * 10 + 10
  assert sum(sizes.values()) == expected


@pytest.mark.slow
def test_standardised_kernels_see_neither_scale_nor_shift():
  model = _make(name="wide_resnet")
  inputs = _INPUTS["wide_resnet"]
  params = model.init(jax.random.key(0), inputs)["params"]
  moved = dict(params)
  moved["StandardizedConv_1"] = params["StandardizedConv_1"] | {
    "kernel": 3 * params["StandardizedConv_1"]["kernel"] + 0.5
  }
  a, b = (model.apply({"params": p}, inputs) for p in (params, moved))
  np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "wide_resnet", "depth": 12}, r"model\.depth must be 10, .* 12"),
    ({"name": "wide_resnet", "num_groups": 0}, r"model\.num_groups .* 0"),
    ({"name": "none"}, r"model\.name .* 'none'"),
    ({"name": "cnn", "width": 0}, r"model\.width .* 0"),
    ({"name": "decoder", "depth": 0}, r"model\.depth .* 0"),
    ({"name": "decoder", "dtype": "float16"}, r"model\.dtype .* 'float16'"),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    _make(**changes)


@pytest.mark.parametrize(
  "size", [5, pytest.param(8, marks=pytest.mark.slow), 1030]
)
def test_evaluator_averages_over_every_held_out_example_once(size):
  model = _make(name="random_features")
  rng = np.random.default_rng(size)
  test = {
    "inputs": rng.random((size, 4), np.float32),
    "targets": rng.integers(0, 10, size, np.int32),
  }
  params = model.init(jax.random.key(0), test["inputs"][0])["params"]
  params["Dense_0"]["kernel"] = jnp.asarray(rng.normal(size=(8, 10)))
  mesh = mesh_lib.make({"data": 4, "fsdp": 2, "model": 1})
  task = cross_entropy.classification(model)
  got = held_out.Evaluator(task, test, mesh, params)(params)
  apply = jax.vmap(lambda x: model.apply({"params": params}, x))
  logits = np.asarray(apply(test["inputs"]), np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  rows = np.arange(size)
  np.testing.assert_allclose(
    got["loss"], -log_probs[rows, test["targets"]].mean(), rtol=1e-5
  )
  assert got["accuracy"] == np.mean(logits.argmax(1) == test["targets"])


def test_a_pass_holds_no_more_logits_than_fit():
  class Wide:
    """Logits [64, 49,152] of a token, as of a pretrained vocabulary."""

    def apply(self, variables, inputs):
      classes = jnp.arange(49_152) == inputs
      return variables["params"] * jnp.tile(classes, (64, 1))

  size = 50
  test = {
    "inputs": np.arange(size, dtype=np.int32),
    "targets": np.tile(np.arange(size, dtype=np.int32)[:, None], (1, 64)),
  }
  mesh = mesh_lib.make({"data": 2, "fsdp": 1, "model": 1}, jax.devices()[:2])
  task = cross_entropy.classification(Wide())
  run = held_out.Evaluator(task, test, mesh, jnp.float32(0))
  shapes = []
  put = jax.make_array_from_callback

  def watched(shape, *args):
    shapes.append(shape)
    return put(shape, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "make_array_from_callback", watched)
    got = run(jnp.float32(20.0))
  rows = {shape[0] for shape in shapes}
  assert len(rows) == 1
  # Half of them on each of two devices, of 12 MiB each.
  assert rows.pop() * 64 * 49_152 * 4 / 2 <= 1 << 28
  assert got["accuracy"] == 1.0


@pytest.mark.slow
def test_cross_entropy_of_a_sequence_is_its_mean():
  model = _make(name="decoder")
  inputs = _INPUTS["decoder"]
  params = model.init(jax.random.key(0), inputs)["params"]
  example = {"inputs": inputs, "targets": np.roll(inputs, -1)}
  loss, aux = cross_entropy.loss_of(model)(params, example, jax.random.key(0))
  log_probs = jax.nn.log_softmax(model.apply({"params": params}, inputs))
  expected = -np.mean(np.asarray(log_probs)[np.arange(12), example["targets"]])
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert aux is None


def test_options_are_for_models_from_outside(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r"model\.options must be empty for"):
    _make(name="linear", options={"depth": 3})
  code = "def make(config):\n  return config.options.depth\n"
  (tmp_path / "outside_model.py").write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  made = _make(name="outside_model:make", options={"depth": 3})
  assert made == 3

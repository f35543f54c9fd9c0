"""Training of some parameters beside others that are frozen.

Steps are those that users run, compiled for meshes of one to eight devices.
"""

import functools
import json
import pathlib
import re
import tempfile

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy as safetensors_numpy

import dpdist
from dpdist import clipping
from dpdist import config as config_lib
from dpdist import errors
from dpdist import sampling
from dpdist.clipping import freezing
from dpdist.distributed import mesh as mesh_lib
from dpdist.export import export
from dpdist.export import load_run
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.models import bert
from dpdist.models import lora
from dpdist.tasks import cross_entropy
from dpdist.training import exact_step
from dpdist.training import job as job_lib
from dpdist.training import parameters
from dpdist.training import step as step_lib
from dpdist.workdir import checkpoints
from dpdist.workdir import fingerprint
from dpdist.workdir import resume
from tests.support import packages
from tests.support import turns

pytestmark = pytest.mark.usefixtures("quick_compiles")

_ROWS = 32
_CLIP = 0.05
_MESHES = {"1": (1, 1, 1), "8": (8, 1, 1), "8, fsdp": (2, 4, 1)}
_TRAINABLE = "lora|head"


def _mesh(name):
  shape = _MESHES[name]
  return mesh_lib.make(
    dict(zip(mesh_lib.AXES, shape, strict=True)),
    jax.devices()[: int(np.prod(shape))],
  )


class _Net(nn.Module):
  """As large as it must be: what is frozen lies before and beside the rest."""

  @nn.compact
  def __call__(self, inputs):
    table = self.param("table", nn.initializers.normal(), (16, 8))
    x = jnp.tanh(
      lora.Dense(12, 2, name="inner")(jnp.mean(jnp.take(table, inputs, 0), 0))
    )
    return nn.Dense(3, name="head")(x)


def _model():
  return _Net()


@functools.cache
def _tokens():
  rng = np.random.default_rng(0)
  return {
    "inputs": rng.integers(0, 16, (_ROWS, 4), np.int32),
    "targets": rng.integers(0, 3, _ROWS, np.int32),
  }


@functools.cache
def _whole():
  """All parameters, none of them at zero."""
  params = jax.jit(_model().init)(jax.random.key(0), _tokens()["inputs"][0])
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32),
    params["params"],
  )


def _is_frozen():
  return parameters.frozen_paths(_TRAINABLE)


@functools.cache
def _mechanism(exact_group_size=None):
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=_ROWS,
      expected_batch_size=_ROWS,
      num_steps=4,
      l2_clip_norm=_CLIP,
      target_delta=1e-5,
      noise_multiplier=0.5,
    )
  )
  return mechanism.make(
    plan,
    cross_entropy.loss_of(_model()),
    exact_group_size=exact_group_size,
    frozen=_is_frozen(),
  )


@functools.cache
def _one_step(mesh_name, exact_group_size=None):
  """The state after a step, and the clipped sum before it."""
  mesh = _mesh(mesh_name)
  make = exact_step.ExactStep if exact_group_size else step_lib.Step
  step = make(_mechanism(exact_group_size), optax.adam(0.1), mesh, 0.5)
  trained, frozen = clipping.partition(_whole(), _is_frozen())
  state = step.init(trained)
  put = lambda x: jax.device_put(x, mesh_lib.examples(mesh))
  batch = jax.tree.map(put, _tokens())
  padding = put(np.arange(_ROWS) >= _ROWS - 3)
  accumulator = step.accumulate(
    state.params,
    step.zeros(state.params),
    batch,
    padding,
    jax.random.key(1),
    0,
    step.placed(frozen),
  )
  summed = jax.tree.map(np.asarray, accumulator.clipped_sum)
  after, _ = step.apply(state, accumulator, jax.random.key(2))
  return after, summed


def _by_hand():
  """The clipped sum, one example after the other, of trained ones alone."""
  trained, frozen = clipping.partition(_whole(), _is_frozen())
  loss_fn = cross_entropy.loss_of(_model())

  @jax.jit
  def clipped(trained, example):
    loss = lambda x: loss_fn(
      step_lib.whole(x, frozen), example, jax.random.key(0)
    )[0]
    grad = jax.grad(loss)(trained)
    norm = optax.tree.norm(grad)
    return jax.tree.map(lambda x: x * jnp.minimum(1, _CLIP / norm), grad), norm

  grads, norms = zip(
    *(
      clipped(trained, jax.tree.map(lambda x, i=i: x[i], _tokens()))
      for i in range(_ROWS - 3)
    ),
    strict=True,
  )
  assert sum(norm > _CLIP for norm in norms) > 5  # Clipping is at work.
  return jax.tree.map(lambda *x: np.sum(np.stack(x), 0), *grads)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", ["1", "8, fsdp"])
def test_the_sum_is_of_trained_parameters_alone(mesh_name):
  _, summed = _one_step(mesh_name)
  expected = _by_hand()
  jax.tree.map(
    lambda x, want: np.testing.assert_allclose(
      x.sum(0), want, rtol=1e-4, atol=1e-6
    ),
    summed,
    expected,
  )


@pytest.mark.parametrize(
  "mesh_name", turns.cells(["1", "8, fsdp"], always=["8, fsdp"])
)
@pytest.mark.slow
def test_nothing_is_kept_or_drawn_for_a_frozen_parameter(mesh_name):
  state, _ = _one_step(mesh_name)
  trained = jax.tree.structure(clipping.partition(_whole(), _is_frozen())[0])
  assert jax.tree.structure(state.params) == trained
  assert jax.tree.structure(state.ema_params) == trained
  moments = state.opt_state[0]
  for kept in (moments.mu, moments.nu):
    assert jax.tree.structure(kept) == trained
  one, _ = _one_step("1")
  jax.tree.map(
    lambda x, want: np.testing.assert_allclose(x, want, rtol=1e-3, atol=1e-4),
    state.params,
    one.params,
  )


@pytest.mark.slow
def test_exact_sums_have_the_same_bits_on_eight_devices():
  digests = {
    fingerprint.params_sha256(_one_step(name, 4)[0]) for name in ("1", "8")
  }
  assert len(digests) == 1


# Weights from disk.


@functools.cache
def _weights():
  return {
    path: np.asarray(leaf, np.float32) + 1
    for path, leaf in zip(
      freezing.names(_whole()), jax.tree.leaves(_whole()), strict=True
    )
    if not re.search(_TRAINABLE, path)
  }


def _parameters(weights, trainable=_TRAINABLE):
  task = cross_entropy.classification(_model())
  return parameters.Parameters(
    functools.partial(parameters.make_params, task),
    np.array([1, 2], np.uint32),
    {"inputs": _tokens()["inputs"][0]},
    weights,
    trainable,
    parameters.frozen_paths(trainable),
  )


@pytest.mark.parametrize("mesh_name", ["1", "8, fsdp"])
def test_weights_from_disk_are_where_they_belong(mesh_name):
  weights = dict(_weights())
  step = step_lib.Step(_mechanism(), optax.sgd(0.1), _mesh(mesh_name))
  start = _parameters(weights)
  whole = step_lib.whole(start.init(step).params, start.frozen(step))
  assert jax.tree.structure(whole) == jax.tree.structure(_whole())
  for path, array in weights.items():
    leaf = functools.reduce(lambda x, key: x[key], path.split("/"), whole)
    np.testing.assert_array_equal(leaf, array)
  # All of them trained: they are the state's.
  every = _parameters(weights, trainable="")
  assert every.frozen(step) is None
  assert start.frozen(step)["table"].sharding.is_fully_replicated == (
    mesh_name == "1"
  )
  word = every.init(step).params["table"]
  np.testing.assert_array_equal(word, weights["table"])


@pytest.mark.parametrize(
  ("trainable", "drop", "message"),
  [
    ("lorra", "", "must name some parameters, and not all, got 'lorra'"),
    (".", "", "must name some parameters, and not all, got '.'"),
    ("lora", "", r"without \['head/bias', 'head/kernel'\], which would stay"),
    ("(", "", "must be a regular expression"),
    (_TRAINABLE, "table", r"without \['table'\]"),
  ],
)
def test_a_misspelt_choice_is_refused(trainable, drop, message):
  weights = dict(_weights())
  weights.pop(drop, None)
  with pytest.raises(ValueError, match=message):
    _parameters(weights, trainable)


def test_weights_of_another_size_are_refused():
  weights = dict(_weights())
  weights["head/bias"] = np.zeros(2, np.float32)
  with pytest.raises(ValueError, match=r"got 'head/bias' of shape \(2,\)"):
    _parameters(weights)


# Whole runs.


_FILES = {
  "train": 64,
  "test": 8,
}


@functools.cache
def _folder():
  """Sentences, and a small BERT in the layout of Hugging Face's."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="dpdist-"))
  rng = np.random.default_rng(5)
  for name, size in _FILES.items():
    tokens = rng.integers(1, 16, (size, 6), np.int32)
    tokens[np.arange(6) >= rng.integers(2, 7, (size, 1))] = bert.PADDING
    targets = (tokens[:, 0] > 7).astype(np.int32)
    np.savez(folder / f"{name}.npz", inputs=tokens, targets=targets)
  safetensors_numpy.save_file(_arrays(), folder / "model.safetensors")
  return folder


def _arrays():
  return packages.bert_arrays(
    vocabulary=16, positions=8, width=8, hidden=16, depth=1
  )


def _config(**changes):
  config = config_lib.default()
  config.data.name = "npz"
  config.data.path = str(_folder())
  config.model.name = "bert"
  config.model.num_outputs = 2
  config.model.vocabulary = 16
  config.model.positions = 8
  config.model.width = 8
  config.model.depth = 1
  config.model.num_heads = 2
  config.model.hidden = 16
  config.model.lora_rank = 2
  config.model.weights = str(_folder() / "model.safetensors")
  config.model.trainable = _TRAINABLE
  config.mesh.fsdp = 2
  config.privacy.num_examples = _FILES["train"]
  config.privacy.expected_batch_size = 32
  config.privacy.num_steps = 8
  config.privacy.noise_multiplier = 1.0
  config.checkpoint_every = 2
  config.eval_every = 8
  config.ema_decay = 0.9
  config.insecure_seed = 7
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("finished")
  return workdir, dpdist.train(_config(), workdir)


class _Crash(Exception):  # noqa: N818
  pass


@pytest.mark.slow
def test_a_crashed_run_ends_with_the_same_parameters(
  finished, tmp_path, monkeypatch
):
  _, expected = finished
  sample = sampling.PoissonSampler.__call__

  def crash(self, step):
    if step == 5:
      raise _Crash
    return sample(self, step)

  with monkeypatch.context() as patch:
    patch.setattr(sampling.PoissonSampler, "__call__", crash)
    with pytest.raises(_Crash):
      dpdist.train(_config(), tmp_path)
  again = dpdist.train(_config(), tmp_path)
  assert again["params_sha256"] == expected["params_sha256"]
  assert again["frozen_sha256"] == expected["frozen_sha256"]
  assert again["steps_charged"] == 8


@pytest.mark.slow
def test_a_frozen_parameter_stays_and_is_in_no_checkpoint(finished):
  workdir, result = finished
  with resume.open_ledger(_config(), workdir) as ledger:
    job = job_lib.prepare(_config(), workdir, ledger)
  assert fingerprint.params_sha256(job.frozen) == result["frozen_sha256"]
  assert result["weights_sha256"] == job.made_of["weights_sha256"]
  path = next((workdir / "checkpoints").glob("writer_*/8"))
  tree = json.loads((path / "state" / "_METADATA").read_text())["tree_metadata"]
  kept = {
    name
    for name, entry in tree.items()
    if entry["value_metadata"]["value_type"] != "None"
  }
  assert any("lora_down" in name for name in kept)
  assert not [name for name in kept if re.search("word|'key'|norm", name)]


@pytest.mark.slow
def test_other_frozen_parameters_are_refused(finished, tmp_path):
  workdir, _ = finished
  saved = ledger_lib.Ledger(workdir / "ledger").checkpoints[-1]
  with resume.open_ledger(_config(), workdir) as ledger:
    like = job_lib.prepare(_config(), workdir, ledger).init()
  with (
    checkpoints.Checkpoints(
      workdir / "checkpoints", writer=99, frozen_sha256="ab" * 32
    ) as others,
    pytest.raises(errors.MismatchError, match=r"SHA-256 \w{64}, and"),
  ):
    others.restore(like, saved)


@pytest.mark.slow
def test_looking_at_a_run_puts_the_model_together(finished, tmp_path):
  workdir, result = finished
  ledger = ledger_lib.Ledger(workdir / "ledger")
  loaded = load_run.load(workdir, ledger)
  scores = load_run.evaluate(loaded)
  assert scores["test"] == result["test"]
  export.write(loaded, scores, tmp_path / "out", name="small")
  model, params = export.load(tmp_path / "out")
  example = {name: x[0] for name, x in loaded.test.items()}
  np.testing.assert_allclose(
    model.apply({"params": params}, example["inputs"]),
    loaded.task.predict(loaded.state.params, example),
    rtol=1e-6,
  )
  assert params["block_0"]["query"]["kernel"].shape == (8, 8)
  jax.tree.map(np.testing.assert_array_equal, params, loaded.state.params)
  # With other weights it is another model.
  other = dict(_arrays())
  other["embeddings.LayerNorm.bias"] = np.ones(8, np.float32)
  path = tmp_path / "model.safetensors"
  safetensors_numpy.save_file(other, path)
  config = _config(**{"model.weights": str(path)})
  with pytest.raises(errors.MismatchError, match="trained beside"):
    load_run.load(workdir, ledger, config=config)


def test_weights_count_and_their_path_does_not():
  config = config_lib.default()
  digest = lambda weights="": fingerprint.fingerprint(
    config.to_dict(), "plan", "data", [], {"weights_sha256": weights}
  )
  before = digest("ab")
  assert digest("cd") != before
  assert digest() != before
  config.model.weights = "/elsewhere/model.safetensors"
  assert digest("ab") == before
  config.model.trainable = "head"
  assert digest("ab") != before

"""What the sentinel watches: every kind of step that a config can make.

Of each kind a right step raises no alarm, in the check before a run and in a
watched step; and of a wrong one both find it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpdist
from dpdist import clipping
from dpdist import config as config_lib
from dpdist import errors
from dpdist.clipping.engines import bookkeeping
from dpdist.distributed import mesh as mesh_lib
from dpdist.keys import keys
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.sensitivity import comparison
from dpdist.training import abstract_step
from dpdist.training import parameters
from dpdist.training import setup
from dpdist.training import step_sentinel
from tests.support import jobs
from tests.support import meshes

_ROWS = 16
_DECODER = {
  "model.name": "stacked_decoder",
  "model.width": 4,
  "model.depth": 1,
  "model.num_heads": 2,
}
_PICTURES = {"model.name": "cnn", "model.width": 4}
_LINEAR = {"model.name": "linear", "model.num_groups": 3}

# For each kind: the mesh, and what differs from the default config.
_KINDS = {
  "model": ("8, model", _DECODER),
  "fsdp": ("8, fsdp", _DECODER),
  "adapters": ("8", _DECODER | {"model.lora_rank": 2}),
  "frozen": ("8", _DECODER | {"model.trainable": "blocks"}),
  "users": ("8", _LINEAR | {"data.examples_per_unit": 3}),
  "groups": (
    "8",
    _LINEAR
    | {"privacy.group_size": 2, "privacy.neighboring_relation": "zero_out"},
  ),
  "copies": (
    "8",
    _PICTURES
    | {"augmentation.multiplicity": 2, "augmentation.flip": True}
    | {"augmentation.crop": 2},
  ),
  "microbatches": ("8", _LINEAR | {"clipping.microbatch_size": 1}),
  "exact": (
    "8",
    _LINEAR | {"clipping.exact_sum": True, "clipping.exact_group_size": 2},
  ),
  "two passes": ("8", _LINEAR | {"clipping.method": "two_pass"}),
}


def _config(changes):
  config = config_lib.default()
  config.model.num_outputs = 16
  config.privacy.num_examples = 1000
  config.privacy.expected_batch_size = 8
  config.privacy.num_steps = 10
  config.privacy.l2_clip_norm = 1e-2
  config.privacy.noise_multiplier = 1.0
  config.update_from_flattened_dict(changes)
  return config


class _Made:
  """A step of a config, and what it takes."""

  def __init__(self, kind):
    name, changes = _KINDS[kind]
    self.config = config = _config(changes)
    rng = np.random.default_rng(0)
    is_text = config.model.name == "stacked_decoder"
    size = {"linear": (6, 6, 3), "cnn": (28, 28, 1)}.get(config.model.name)
    one = {
      "inputs": jax.ShapeDtypeStruct(size or (6,), "if"[not is_text] + "4"),
      "targets": jax.ShapeDtypeStruct((6,) if is_text else (), "i4"),
    }
    self.row = abstract_step.unit(config, one)
    self.experiment = setup.build(config, meshes.of(name))
    self.step = self.experiment.step
    task = self.experiment.task
    zeros = {name: np.zeros(x.shape, x.dtype) for name, x in one.items()}
    params = parameters.make_params(task, np.zeros(2, np.uint32), zeros)
    # No part of it begins as 0.
    draw = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    trained, frozen = clipping.partition(
      jax.tree.map(draw, params), self.step.mechanism.clipped_grad.frozen
    )
    self.params = self.step.placed(trained)
    has_frozen = self.step.mechanism.clipped_grad.frozen is not None
    self.frozen = self.step.placed(frozen) if has_frozen else None

    def data(x):
      if x.dtype == np.bool_:
        return np.zeros((_ROWS, *x.shape), bool)
      if np.issubdtype(x.dtype, np.integer):
        return rng.integers(0, 16, (_ROWS, *x.shape)).astype(x.dtype)
      return rng.normal(size=(_ROWS, *x.shape)).astype(x.dtype)

    put = lambda x: jax.device_put(x, mesh_lib.examples(self.step.mesh))
    self.chunk = jax.tree.map(put, jax.tree.map(data, self.row))
    self.is_padding = put(np.zeros(_ROWS, bool))

  def check(self):
    return step_sentinel.check_step(
      self.step,
      self.params,
      self.frozen,
      row=self.row,
      largest=self.experiment.largest_integers(self.row),
      chunk_size=_ROWS,
    )

  def found(self, steps):
    """In how many watched steps an example was found."""
    streams = mechanism.Streams(keys.insecure_secret(3), "a")
    watcher = step_sentinel.Sentinel(
      self.step, self.frozen, streams, every=1, first_step=0
    )
    count = 0
    for t in range(steps):
      watcher.begin(t, self.params)
      watcher.accumulate(
        self.params,
        self.step.zeros(self.params),
        *(self.chunk, self.is_padding, jax.random.key(t), 0),
      )
      count += bool(watcher.end())
    return count


def _norms_of_a_thousandth():
  """Takes all norms for a part of them."""
  norm = bookkeeping.norm

  def wrong(*args):
    size, formed = norm(*args)
    return size / 1000, formed

  bookkeeping.norm = wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", _KINDS)
def test_a_right_step_passes_and_a_wrong_one_is_found(kind, monkeypatch):
  made = _Made(kind)
  assert made.check().num_examples >= 3
  assert made.found(8) == 0
  monkeypatch.setattr(bookkeeping, "norm", bookkeeping.norm)  # Put back.
  _norms_of_a_thousandth()
  # To find the parameter would compile a program for each.
  monkeypatch.setattr(comparison, "blamed", lambda *args: [])
  made = _Made(kind)
  with pytest.raises(errors.SensitivityError):
    made.check()
  assert made.found(2) == 2


def test_a_loss_with_a_state_is_checked_and_not_watched(monkeypatch):
  """`with_state` is for loops of one's own."""

  def loss(params, state, rng, example):
    del rng
    out = jnp.tanh(example["x"] @ params * state)
    return 50 * jnp.sum((out - example["y"]) ** 2), (state * 0.9, {})

  fn = dpdist.with_state(loss, l2_clip_norm=0.1, aggregate={})
  params = (jnp.ones((4, 3)), jnp.ones(()))
  batch = {"x": np.ones((4, 4), np.float32), "y": np.ones((4, 3), np.float32)}

  def check():
    return dpdist.check_sensitivity(
      fn.clipped_grad.loss_fn,
      params,
      batch,
      l2_clip_norm=(0.1, None),
      has_aux=True,
      frozen=(False, True),
      rng=jax.random.key(0),
    )

  assert set(check().ways) == {"0"}
  monkeypatch.setattr(bookkeeping, "norm", bookkeeping.norm)
  _norms_of_a_thousandth()
  with pytest.raises(errors.SensitivityError):
    check()


def test_an_example_without_a_derivative_adds_nothing():
  """Nothing is known of its length."""
  loss = lambda params, x: jnp.sum(params * x)
  fn = dpdist.clipped_grad(loss, l2_clip_norm=10.0)
  batch = jnp.array([[3.0, 4.0], [1e38, 1e38]])
  direction = jnp.array([5.0, 0.0])
  out = jax.jit(fn)(jnp.zeros(2), batch, direction=direction)
  assert not np.any(out.found)
  np.testing.assert_allclose(out.sum, [3.0, 4.0], rtol=1e-5)


# Jobs of two processes.


def _search_nothing():
  from dpdist.sensitivity import trials

  trials.search = lambda program: None


def _find_a_fault():
  from dpdist.sensitivity import comparison

  comparison.judge = lambda *args, **kwargs: comparison.Problem("is bad", (0,))


@pytest.fixture(name="aside")
def fixture_aside(tmp_path):
  (tmp_path / "aside").mkdir()
  return tmp_path / "aside"


def _end(runs):
  try:
    return [run.wait() for run in runs]
  finally:
    for run in runs:
      run.kill()


@pytest.mark.cluster
def test_two_processes_stop_together_while_they_run(tmp_path, aside):
  changes = dict.fromkeys((0, 1), (_norms_of_a_thousandth, _search_nothing))
  runs = jobs.start(tmp_path / "run", 2, aside=aside, changes=changes)
  assert _end(runs) == [1, 1], runs[0].screen + runs[1].screen
  for run in runs:
    assert "the sentinel found an example" in run.screen
  ledger = ledger_lib.Ledger(tmp_path / "run" / "ledger")
  assert history.TOO_LONG in ledger.guarantee
  assert len(ledger.checkpoints) == 1


@pytest.mark.cluster
def test_two_processes_stop_together_where_one_finds_a_fault(tmp_path, aside):
  changes = {1: (_find_a_fault,)}
  runs = jobs.start(tmp_path / "run", 2, aside=aside, changes=changes)
  assert _end(runs) == [1, 1], runs[0].screen + runs[1].screen
  assert "another process found a clipped sum" in runs[0].screen
  assert "is bad" in runs[1].screen
  assert ledger_lib.Ledger(tmp_path / "run" / "ledger").spent_steps == 0

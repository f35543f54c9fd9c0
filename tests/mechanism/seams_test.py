"""A toy of each part of a mechanism, from outside the package, in one file."""

import dataclasses
import importlib
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpdist
from dpdist import config as config_lib
from dpdist import errors
from dpdist import registry
from dpdist.accounting import step_events
from dpdist.clipping import clipper
from dpdist.distributed import mesh as mesh_lib
from dpdist.ledger import ledger as ledger_lib
from dpdist.mechanism import mechanism
from dpdist.mechanism import outside_code
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import statement
from dpdist.sums import fixed_point
from dpdist.training import exact_step
from dpdist.training import step as step_lib
from tests.support import meshes
from tests.support import turns

_DATASET = """
import numpy as np
from dpdist.data import arrays
from dpdist.data import dataset


def load(config):
  rng = np.random.default_rng(0)
  part = lambda n: arrays.ArraySource({
    "inputs": rng.normal(size=(n, 4)).astype(np.float32),
    "targets": rng.integers(0, 2, n).astype(np.int32),
  })
  return dataset.Dataset(train=part(32), test=part(8))
"""

_SAMPLING = '''
import numpy as np
from dpdist.accounting import gaussian_events
from dpdist.accounting import step_events


class Everyone:
  """Draws all rows at each step."""

  def check(self, numbers):
    if numbers.expected_batch_size != numbers.num_examples:
      raise ValueError("expected_batch_size must be all rows")

  def probability(self, numbers, batch_size):
    return 1.0

  def typical_rows(self, numbers, batch_size):
    return numbers.num_examples

  def most_rows(self, numbers, batch_size, tail):
    return numbers.num_examples

  def make(self, numbers, batch_size, *, seed, first_release):
    return lambda step: np.arange(numbers.num_examples)

  def summary(self, numbers):
    return "all rows"

  def describe(self, numbers):
    return "Each step takes all of them."

# The proof.
@step_events.proof(sampling="toy_sampling:Everyone")
def everyone(numbers):
  return step_events.by_turns(numbers, gaussian_events.AddRemove)
'''

_NOISE = '''
import dataclasses
from typing import Any, NamedTuple
import jax
import jax.numpy as jnp
from dpdist.accounting import proofs
from dpdist.accounting import step_events


class State(NamedTuple):
  draws: jax.Array
  ages: Any


@dataclasses.dataclass(frozen=True)
class Louder:
  """Draws more noise than the plan wants, and counts draws by entry."""
  factor: float = 2.0
  restarts = "from_state"

  def sensitivity_factor(self, num_steps):
    return self.factor

  def init(self, params):
    ages = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), params)
    return State(jnp.zeros((), jnp.int32), ages)

  def draw(self, like, state, *, key, release_index, stddev):
    key = jax.random.fold_in(key, state.draws)
    keys = jax.random.split(key, jax.tree.structure(like).num_leaves)
    keys = jax.tree.unflatten(jax.tree.structure(like), list(keys))
    noise = jax.tree.map(
      lambda x, k, s: s * jax.random.normal(k, x.shape, x.dtype),
      like, keys, jax.tree.broadcast(stddev, like),
    )
    ages = jax.tree.map(lambda x: x + 1, state.ages)
    return noise, State(state.draws + 1, ages)

# The proof.
@step_events.proof(sampling="poisson", noise="toy_noise:Louder")
def louder(numbers):
  return proofs.poisson(numbers)
'''

_CLIPPER = '''
import dataclasses
from typing import Any
import jax.numpy as jnp
from dpdist import clipping
from dpdist.accounting import proofs
from dpdist.accounting import step_events


@dataclasses.dataclass(frozen=True)
class Counting:
  """Learns which part of the gradients is short."""
  clipped_grad: Any
  share: float = 0.1
  copies: int = 0

  @property
  def extra(self):
    shape = (self.copies,) if self.copies else ()
    return {"short": clipping.Extra(shape, self.share)}

  def init(self):
    shape = self.extra["short"].shape
    return {"short": jnp.zeros(shape), "steps": jnp.zeros((), jnp.int32)}

  def clip(self, params, batch, state, **arguments):
    return self.clipped_grad(params, batch, **arguments)

  def observe(self, grads, state):
    is_short = grads.grad_norms <= self.clipped_grad.l2_clip_norm
    values = is_short.astype(jnp.float32)
    if self.copies:
      values = jnp.zeros((values.size, self.copies)).at[:, 0].set(values)
    return {"short": values}

  def finish(self, gradient, extra, state):
    return gradient, {"short": extra["short"], "steps": state["steps"] + 1}


class Forgetful(Counting):
  """Counts, and learns nothing."""

  def init(self):
    return ()

  def finish(self, gradient, extra, state):
    return gradient, state


class Endless(Forgetful):
  """Says of a share what is no number."""
  extra = {"short": clipping.Extra((), float("nan"))}

# The proof.
@step_events.proof(sampling="poisson", clipper="toy_clipper:Endless")
@step_events.proof(sampling="poisson", clipper="toy_clipper:Counting")
@step_events.proof(sampling="poisson", clipper="toy_clipper:Forgetful")
def counting(numbers):
  return proofs.poisson(numbers)
'''

_TOYS = {
  "toy_sampling": (
    _SAMPLING,
    {
      "privacy.sampling": "toy_sampling:Everyone",
      "privacy.expected_batch_size": 32,
    },
  ),
  "toy_noise": (
    _NOISE,
    {
      "privacy.noise": "toy_noise:Louder",
      "privacy.noise_options": {"factor": 3.0},
    },
  ),
  "toy_clipper": (
    _CLIPPER,
    {
      "privacy.clipping": "toy_clipper:Counting",
      "privacy.clipping_options": {"share": 0.25},
    },
  ),
}


@pytest.fixture(name="outside")
def fixture_outside(tmp_path, monkeypatch):
  """A folder of modules, as if installed, and a process that knows none."""
  monkeypatch.syspath_prepend(tmp_path)
  _start_again(monkeypatch)
  (tmp_path / "toy_data.py").write_text(_DATASET)
  yield tmp_path
  _start_again(monkeypatch)


def _start_again(monkeypatch):
  """Forgets what another process would not know."""
  for name in ("toy_data", *_TOYS):
    sys.modules.pop(name, None)
  monkeypatch.setattr(registry, "_digests", {})
  ours = {k: v for k, v in registry._things["proof"].items() if "toy" not in k}
  monkeypatch.setitem(registry._things, "proof", ours)
  importlib.invalidate_caches()


def _config(changes, **others):
  config = config_lib.default()
  flat = {
    "data.name": "toy_data:load",
    "model.name": "linear",
    "model.num_outputs": 2,
    "privacy.num_examples": 32,
    "privacy.expected_batch_size": 8,
    "privacy.num_steps": 2,
    "privacy.noise_multiplier": 2.0,
    "checkpoint_every": 1,
    "insecure_seed": 1,
  }
  for name, value in (flat | changes | others).items():
    section, _, key = name.rpartition(".")
    part = config[section] if section else config
    if isinstance(value, dict):
      part[key].update(value)
    else:
      config.update_from_flattened_dict({name: value})
  return config


@pytest.mark.parametrize("toy", turns.cells(_TOYS, always=["toy_clipper"]))
@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.slow
def test_a_run_trains_with_a_part_from_outside(toy, outside, tmp_path):
  text, changes = _TOYS[toy]
  (outside / f"{toy}.py").write_text(text)
  result = dpdist.train(_config(changes), tmp_path / "run")
  assert result["num_steps"] == 2
  plan = ledger_lib.Ledger(tmp_path / "run" / "ledger").plan
  name = f"{toy}:" + {"toy_sampling": "Everyone", "toy_noise": "Louder"}.get(
    toy, "Counting"
  )
  assert name in plan.to_dict().values()
  assert type(plan).from_dict(plan.to_dict()) == plan
  assert name in statement.of_plan(plan) or toy == "toy_sampling"
  # The steps of the plan are those of the proof.
  q = 1.0 if toy == "toy_sampling" else 0.25
  assert result["epsilon"] == dpdist.accounting.epsilon(
    noise_multiplier=2.0, sampling_probability=q, num_steps=2, delta=1e-5
  )


@pytest.mark.parametrize("toy", _TOYS)
def test_a_part_without_a_proof_is_refused_before_anything_is_charged(
  toy, outside, tmp_path
):
  """No proof, no run."""
  text, changes = _TOYS[toy]
  (outside / f"{toy}.py").write_text(text.partition("# The proof.")[0])
  with pytest.raises(ValueError, match="no proof, no run"):
    dpdist.train(_config(changes), tmp_path / "run")
  assert not (tmp_path / "run" / "ledger").exists()
  privacy = {
    key.removeprefix("privacy."): value for key, value in changes.items()
  }
  with pytest.raises(ValueError, match="no proof, no run"):
    dpdist.PrivacyConfig(**_SETTINGS | privacy)


def test_a_proof_is_of_all_three_together(outside):
  """Each of them has a proof, but not with one another."""
  for toy, (text, _) in _TOYS.items():
    (outside / f"{toy}.py").write_text(text)
  noise = {"noise": "toy_noise:Louder"}
  dpdist.PrivacyConfig(**_SETTINGS | noise)
  for other in (
    {"sampling": "cyclic_poisson"},
    {"clipping": "toy_clipper:Counting"},
    {"sampling": "toy_sampling:Everyone", "expected_batch_size": 32},
  ):
    with pytest.raises(ValueError, match="no proof, no run"):
      dpdist.PrivacyConfig(**_SETTINGS | noise | other)


@pytest.mark.parametrize("toy", turns.cells(_TOYS, always=["toy_noise"]))
@pytest.mark.usefixtures("quick_compiles")
def test_other_code_of_a_part_gets_other_keys(
  toy, outside, tmp_path, monkeypatch
):
  text, changes = _TOYS[toy]
  (outside / f"{toy}.py").write_text(text)
  workdir = tmp_path / "run"
  dpdist.train(_config(changes), workdir)
  before = ledger_lib.Ledger(workdir / "ledger").branches
  (workdir / "result.json").unlink()
  (outside / f"{toy}.py").write_text(text + "\n# Another.\n")
  _start_again(monkeypatch)
  dpdist.train(_config(changes), workdir)
  after = ledger_lib.Ledger(workdir / "ledger").branches
  assert len(after) == len(before) + 1
  assert after[-1].identity != before[-1].identity


def test_what_a_sampling_draws_is_in_the_digest_of_its_code(
  outside, monkeypatch
):
  """Also where no file of its code says what that is."""
  text, changes = _TOYS["toy_sampling"]
  text = text.replace(
    "np.arange(numbers.num_examples)",
    "np.arange(numbers.num_examples) + int(os.environ['TOY_OFFSET'])",
  )
  (outside / "toy_sampling.py").write_text("import os\n" + text)
  config = config_lib.privacy_config(_config(changes))
  digests = []
  for offset in ("0", "0", "1"):
    monkeypatch.setenv("TOY_OFFSET", offset)
    digests.append(outside_code.sha256(config))
  assert digests[0] == digests[1] != digests[2]


def _verified(workdir, cwd, *flags):
  """Runs launch.verify in a process that finds modules in a folder."""
  root = pathlib.Path(dpdist.__file__).parents[1]
  return subprocess.run(
    [sys.executable, "-m", "launch.verify", f"--workdir={workdir}", *flags],
    env={**os.environ, "PYTHONPATH": f"{root}:{cwd}"},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.usefixtures("quick_compiles")
def test_reading_a_record_imports_no_code_that_the_reader_did_not_name(
  outside, tmp_path, monkeypatch
):
  """Whoever can write a ledger must not choose what its readers run."""
  text, changes = _TOYS["toy_noise"]
  text += f"\nopen({str(tmp_path / 'imported')!r}, 'w').close()\n"
  (outside / "toy_noise.py").write_text(text)
  workdir = tmp_path / "run"
  dpdist.train(_config(changes), workdir)
  values = ledger_lib.Ledger(workdir / "ledger").plan.to_dict()
  (tmp_path / "imported").unlink()
  _start_again(monkeypatch)
  with pytest.raises(errors.LedgerError, match="toy_noise:Louder"):
    ledger_lib.Ledger(workdir / "ledger")
  with pytest.raises(errors.ArgumentError, match="import its module first"):
    plan_lib.PrivacyPlan.from_dict(values)
  got = _verified(workdir, outside)
  assert got.returncode == 1
  assert "toy_noise:Louder" in got.stdout
  assert not (tmp_path / "imported").exists()
  got = _verified(workdir, outside, "--code=toy_noise")
  assert got.returncode == 0, got.stdout + got.stderr
  assert (tmp_path / "imported").exists()
  got = _verified(workdir, outside, "--code=toy_none")
  assert got.returncode == 2
  # Settings name it themselves: the run goes on.
  assert dpdist.train(_config(changes), workdir)["num_steps"] == 2


def test_nothing_without_a_proof_is_called():
  """A name in a record must not call what happens to be imported."""
  called = []
  errors.call_me = lambda: called.append(1)
  errors.call_me.__module__ = "dpdist.errors"
  try:
    with pytest.raises(errors.ArgumentError, match="no proof, no run"):
      dpdist.PrivacyConfig(**_SETTINGS, sampling="dpdist.errors:call_me")
  finally:
    del errors.call_me
  assert not called


def test_names_of_a_proof_cannot_be_taken_for_others():
  with pytest.raises(errors.ArgumentError, match='a name without "/"'):
    step_events.proof(sampling="toy", noise="toy/gaussian")
  assert not step_events.is_proven("toy/toy", "gaussian", "fixed")


def test_ours_are_no_code_from_outside():
  from dpdist.mechanism import outside_code

  assert outside_code.sha256(dpdist.PrivacyConfig(**_SETTINGS)) == ""


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"noise_options": {"factor": [1]}}, "noise_options must be a dict"),
    ({"noise_options": "factor"}, "noise_options must be a dict"),
    ({"noise_options": {"x": float("nan")}}, "must be a dict of finite"),
    ({"noise_options": {"x": 1}}, "noise_options must be empty with noise='g"),
    ({"clipping_options": {"x": 1}}, "must be empty with clipping='fixed'"),
    ({"noise": "laplace"}, "noise and clipping must have a proof together"),
    ({"clipping": ""}, "clipping must be a name, got ''"),
    ({"sampling": "toy_none:Some"}, "must be package.module:attribute"),
  ],
)
def test_bad_parts_are_named(options, message):
  with pytest.raises(errors.ArgumentError, match=message):
    dpdist.PrivacyConfig(**_SETTINGS | options)


# The extra leaf.

_SETTINGS = {
  "num_examples": 32,
  "expected_batch_size": 8,
  "num_steps": 4,
  "l2_clip_norm": 0.3,
  "target_delta": 1e-5,
  "noise_multiplier": 2.0,
}
_ROWS = 64


def _loss(params, example, rng):
  del rng
  return jnp.dot(params["w"], example), None


def _made(outside, exact=None, name="Counting", **options):
  (outside / "toy_clipper.py").write_text(_CLIPPER)
  settings = {
    **_SETTINGS,
    "clipping": f"toy_clipper:{name}",
    "clipping_options": options,
    "num_examples": 256,
  }
  plan = dpdist.make_plan(dpdist.PrivacyConfig(**settings))
  return mechanism.make(plan, _loss, exact_group_size=exact)


def _examples():
  """Rows of one entry each, a third of which are longer than the clip norm."""
  rows = np.zeros((_ROWS, 16), np.float32)
  rows[:, 0] = np.where(np.arange(_ROWS) % 3 == 0, 2.0, 0.25)
  return rows


def _accumulated(step):
  """A state, and the sums of two padded chunks over the mesh."""
  state = step.init({"w": jnp.zeros(16)})
  accumulator = step.begin(state)
  put = lambda x: jax.device_put(x, mesh_lib.examples(step.mesh))
  rows, is_padding = _examples(), np.arange(_ROWS) >= 50
  for start in (0, 32):
    accumulator = step.accumulate(
      state.params,
      accumulator,
      put(rows[start : start + 32]),
      put(is_padding[start : start + 32]),
      jax.random.key(0),
      start,
    )
  return state, accumulator


def _stepped(step):
  """What a step has learned, and how it has moved the parameters."""
  after, _ = step.apply(*_accumulated(step), jax.random.key(1))
  learned = after.noise_state.learned["short"]
  return np.asarray(learned), np.asarray(after.params["w"])


_SHORT = np.sum(_examples()[:50, 0] < 0.3) / 8


@pytest.mark.parametrize(
  "name",
  turns.cells(["1", "8", "8, fsdp", "8, model"], always=["8"]),
)
def test_an_extra_leaf_is_added_up_over_all_chunks_and_devices(outside, name):
  made = dataclasses.replace(_made(outside), noise_stddev=0.0)
  step = step_lib.Step(made, optax.sgd(1.0), meshes.of(name))
  learned, moved = _stepped(step)
  assert learned == _SHORT  # Exactly: no padding, no rounding.
  rows = _examples()[:50, 0]
  expected = -np.sum(rows * np.minimum(1, 0.3 / rows)) / 8
  assert moved[0] == pytest.approx(expected, rel=1e-6)


def test_the_noise_of_all_leaves_is_that_of_one_mechanism(outside):
  """By 1 / (multiplier of a leaf)^2, which add up to that of the plan."""
  made = _made(outside, copies=20_000, share=0.2)
  step = step_lib.Step(made, optax.sgd(1.0), meshes.of("8"))
  learned, _ = _stepped(step)
  bound = clipper.bound(0.3)
  leaf = np.std(learned[1:]) * 8 * bound / 0.3
  spent = (0.3 / made.noise_stddev) ** 2 + leaf**-2
  assert leaf == pytest.approx(2.0 / math.sqrt(0.2), rel=0.02)
  assert (0.3 / made.noise_stddev) ** 2 == pytest.approx(0.8 / 2.0**2)
  assert spent == pytest.approx(2.0**-2, rel=0.02)


@pytest.mark.parametrize("name", turns.cells(["1", "8"], always=["1"]))
def test_exact_sums_carry_an_extra_leaf(outside, name):
  made = _made(outside, exact=4, name="Forgetful", share=0.1)
  step = exact_step.ExactStep(made, optax.sgd(1.0), meshes.of(name))
  state, accumulator = _accumulated(step)
  limbs, _ = step.reduce(accumulator)
  form = made.sum_format(state.params)
  short = fixed_point.to_float(
    form, fixed_point.carry(limbs.extra["short"]), np.float32
  )
  bound = clipper.bound(made.clipped_grad.l2_clip_norm)
  assert bound < 0.3
  assert float(short) == bound * _SHORT * 8
  after, _ = step.apply(state, accumulator, jax.random.key(1))
  assert np.all(np.isfinite(after.params["w"]))


def test_a_clipper_that_learns_does_not_go_with_exact_sums(outside):
  with pytest.raises(ValueError, match="must be False with a clipper that"):
    exact_step.ExactStep(
      _made(outside, exact=4), optax.sgd(1.0), meshes.of("8")
    )


def test_private_gradients_carry_the_extra_leaf(outside):
  plan = _made(outside).plan
  fn = dpdist.private_gradients(
    lambda p, x: _loss(p, x, None)[0], plan, seed=b"1" * 32
  )
  params = {"w": jnp.zeros(16)}
  state = fn.init(params)
  fn = dataclasses.replace(
    fn, mechanism=dataclasses.replace(fn.mechanism, noise_stddev=0.0)
  )
  _, state = jax.jit(fn)(params, jnp.asarray(_examples()[:50]), state)
  assert int(state.draws) == 1
  assert float(state.learned["short"]) == _SHORT


def test_nothing_is_learned_after_the_last_step_of_a_plan(outside):
  """Compiled, a loop can go on; what it learns then would be unpaid."""
  plan = _made(outside).plan
  fn = dpdist.private_gradients(
    lambda p, x: _loss(p, x, None)[0], plan, seed=b"1" * 32
  )
  params, rows = {"w": jnp.zeros(16)}, jnp.asarray(_examples())
  step = jax.jit(fn)
  state = fn.init(params)
  for _ in range(plan.num_steps):
    got, state = step(params, rows, state)
  assert np.all(np.isfinite(got.gradient["w"]))
  assert state.learned["steps"] == plan.num_steps
  got, after = step(params, rows, state)
  assert np.all(np.isnan(got.gradient["w"]))
  assert after.learned == state.learned


def test_exact_sums_never_cut_noise(outside):
  """Cut noise is not the noise of the proof: NaN tells nothing."""
  (outside / "toy_noise.py").write_text(
    _NOISE.replace("s * jax", "10 * s * jax")
  )
  settings = _SETTINGS | {"noise": "toy_noise:Louder", "num_examples": 256}
  plan = dpdist.make_plan(dpdist.PrivacyConfig(**settings))
  made = mechanism.make(plan, _loss, exact_group_size=4)
  step = exact_step.ExactStep(made, optax.sgd(1.0), meshes.of("1"))
  params = {"w": jnp.zeros(16)}
  noise, _ = made.draw_noise(params, made.init(params), jax.random.key(1))
  is_large = np.abs(noise["w"]) > made.largest_noise
  assert 0 < np.sum(is_large) < 16
  after, _ = step.apply(*_accumulated(step), jax.random.key(1))
  np.testing.assert_array_equal(np.isnan(after.params["w"]), is_large)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_no_example_moves_an_extra_leaf_by_more_than_the_bound(shape):
  rng = np.random.default_rng(0)
  values = rng.normal(size=(64, *shape)) * 10.0 ** rng.uniform(
    -3, 37, (64,) + (1,) * len(shape)
  )
  values[:3] = np.reshape([np.nan, np.inf, -np.inf], (3,) + (1,) * len(shape))
  values = values.astype(np.float32)
  bound = clipper.bound(0.7)
  assert 0.65 < bound <= 0.7
  padding = np.zeros(64, bool)
  add_up = jax.jit(clipper.add_up, static_argnums=2)
  total = np.asarray(add_up(values, padding, bound), np.float64)
  for i in range(64):
    others = np.asarray(add_up(values, np.arange(64) == i, bound), np.float64)
    assert np.linalg.norm((total - others).ravel()) <= bound
  assert np.all(np.asarray(add_up(values, ~padding, bound)) == 0)


def test_an_extra_leaf_that_takes_all_is_refused(outside):
  with pytest.raises(ValueError, match="leave some for the gradient"):
    _made(outside, share=1.0)


def test_a_share_that_is_no_number_is_refused(outside):
  with pytest.raises(ValueError, match="leave some for the gradient"):
    _made(outside, name="Endless")


@pytest.mark.parametrize("size", [1, 2, 1000, 2**21])
def test_no_order_of_additions_makes_an_extra_leaf_count_for_more(size):
  """One after the other is the worst that a compiler could do."""
  # After a large first square, all others are too small to be added to it.
  values = np.full(size, 2.0**-12.5, np.float32)
  values[0] = 1.0
  added = np.add.accumulate(values * values, dtype=np.float32)[-1]
  norm = np.sqrt(added, dtype=np.float32)
  cut = values / np.maximum(norm / np.float32(clipper.room_of(size)), 1)
  counted = np.trunc(cut.astype(np.float64) * 2**19) / 2**19
  assert np.linalg.norm(counted) <= 1
  assert np.linalg.norm(cut.astype(np.float64)) <= 1 + (size == 1) * 2**-22
  assert clipper.room_of(size) > 0.7

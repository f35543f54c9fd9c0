"""A user is the unit: what one can do to a sum, and a run from end to end."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpdist
from dpdist import config as config_lib
from dpdist import errors
from dpdist import models
from dpdist import sampling
from dpdist.assets import fetch
from dpdist.data import arrays as arrays_lib
from dpdist.data import users as users_lib
from dpdist.data.datasets import chitchat
from dpdist.data.datasets import datasets
from dpdist.distributed import mesh as mesh_lib
from dpdist.ledger import ledger
from dpdist.mechanism import mechanism
from dpdist.tasks import cross_entropy
from dpdist.tasks import per_unit
from dpdist.training import abstract_step
from dpdist.training import data_checks
from dpdist.training import exact_step
from dpdist.training import setup
from dpdist.training import step as step_lib
from dpdist.workdir import verify

pytestmark = pytest.mark.usefixtures("quick_compiles")

SLOTS = 4
C = 0.3
# How many examples each of 16 users has, those beside them with none.
COUNTS = [1, SLOTS, 2, 0, 3, SLOTS, 1, 1, 2, 0, SLOTS, 3, 1, 2, SLOTS, 1]


def _model():
  config = config_lib.default().model
  config.name, config.num_outputs, config.width = "random_features", 3, 8
  return models.make(config)


MODEL = _model()
LOSS = per_unit.mean_over_unit(
  cross_entropy.loss_of(MODEL), empty_slot=users_lib.SLOT_IS_EMPTY
)


@functools.cache
def _users():
  """A chunk of users, as NumPy arrays, with junk in the empty slots."""
  rng = np.random.default_rng(0)
  shape = (len(COUNTS), SLOTS)
  inputs = rng.normal(size=(*shape, 4)).astype(np.float32)
  is_empty = np.arange(SLOTS) >= np.array(COUNTS)[:, None]
  inputs[is_empty] = np.nan
  return {
    "inputs": inputs,
    "targets": rng.integers(0, 3, shape).astype(np.int32),
    users_lib.SLOT_IS_EMPTY: is_empty,
  }


@functools.cache
def _params():
  params = MODEL.init(jax.random.key(0), np.zeros(4, np.float32))["params"]
  draw = lambda x: np.random.default_rng(1).normal(size=x.shape)
  return jax.tree.map(lambda x: draw(x).astype(np.float32), params)


@functools.cache
def _gradient(user):
  """Of the mean loss of a user's examples, each taken by itself; flat."""
  loss = cross_entropy.loss_of(MODEL)
  grad = jax.grad(lambda p, e: loss(p, e, jax.random.key(0))[0])
  rows = {k: x[user] for k, x in _users().items()}
  total = [np.zeros(24)]
  for slot in range(COUNTS[user]):
    example = {k: rows[k][slot] for k in ("inputs", "targets")}
    total.append(_flat(grad(_params(), example)))
  return np.sum(total, 0) / max(1, COUNTS[user])


def _flat(tree):
  leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  return np.concatenate(leaves)


def _clipped(gradient):
  return gradient * min(1, C / max(np.linalg.norm(gradient), 1e-30))


def _sum(step, left_out=()):
  """The clipped sum of a chunk on all devices, with users left out."""
  is_padding = np.isin(np.arange(len(COUNTS)), left_out)
  sharding = mesh_lib.examples(step.mesh)
  put = lambda x: jax.device_put(x, sharding)
  params = mesh_lib.place(_params(), step.specs(_params()), step.mesh)
  accumulator = step.accumulate(
    params,
    step.zeros(params),
    jax.tree.map(put, _users()),
    put(is_padding),
    jax.random.key(0),
    0,
  )
  return step, params, accumulator


def _total(step, left_out=()):
  _, _, accumulator = _sum(step, left_out)
  parts = jax.tree.leaves(accumulator.clipped_sum)
  return _flat([np.asarray(x, np.float64).sum(0) for x in parts])


@functools.cache
def _step(sizes, method):
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=16,
      expected_batch_size=8,
      num_steps=1,
      l2_clip_norm=C,
      target_delta=1e-3,
      noise_multiplier=1.0,
      unit="user",
    )
  )
  mesh = mesh_lib.make(dict(zip(mesh_lib.AXES, sizes, strict=True)))
  made = mechanism.make(plan, LOSS, method=method)
  assert made.sensitivity == C
  return step_lib.Step(made, optax.sgd(1.0), mesh)


@pytest.mark.parametrize(
  ("sizes", "method"),
  [
    ((8, 1, 1), "auto"),
    ((2, 4, 1), "auto"),
    pytest.param((8, 1, 1), "vmap", marks=pytest.mark.slow),
  ],
)
def test_a_user_moves_the_sum_of_8_devices_by_one_clipped_gradient(
  sizes, method
):
  step = _step(sizes, method)
  whole = _total(step)
  expected = [_clipped(_gradient(user)) for user in range(len(COUNTS))]
  np.testing.assert_allclose(whole, np.sum(expected, 0), atol=2e-6)
  norms = [np.linalg.norm(_gradient(user)) for user in range(len(COUNTS))]
  # Some are clipped and some are not, or this would show little.
  assert min(n for n in norms if n) < C < max(norms)
  for user in (0, 1, 3, int(np.argmax(norms))):
    moved = whole - _total(step, [user])
    assert np.linalg.norm(moved) <= C * (1 + 1e-5)
    np.testing.assert_allclose(moved, expected[user], atol=2e-6)
  assert (COUNTS[0], COUNTS[1]) == (1, SLOTS)
  np.testing.assert_array_equal(whole, _total(step, [3]))  # No example.


@pytest.mark.slow
def test_users_are_summed_exactly_on_any_devices():
  plan = _step((8, 1, 1), "auto").mechanism.plan
  made = mechanism.make(plan, LOSS, exact_group_size=2)
  found = []
  for count in (1, 2):
    mesh = mesh_lib.make(
      {"data": count, "fsdp": 1, "model": 1}, devices=jax.devices()[:count]
    )
    step = exact_step.ExactStep(made, optax.sgd(1.0), mesh)
    state = step.init(_params())
    _, _, accumulator = _sum(step)
    after, _ = step.apply(state, accumulator, jax.random.key(1))
    found.append(_flat(after.params))
  np.testing.assert_array_equal(*found)


def test_a_user_without_an_example_has_no_loss_and_no_gradient():
  unit = {k: jnp.asarray(x[3]) for k, x in _users().items()}
  run = jax.value_and_grad(lambda p: LOSS(p, unit, jax.random.key(0))[0])
  loss, gradient = jax.jit(run)(_params())
  assert loss == 0
  assert not _flat(gradient).any()


def test_each_slot_has_its_own_rng():
  noisy = lambda p, example, rng: (jax.random.normal(rng), None)
  loss = per_unit.mean_over_unit(noisy, empty_slot=users_lib.SLOT_IS_EMPTY)
  unit = {k: jnp.asarray(x[1]) for k, x in _users().items()}
  key = jax.random.key(5)
  draws = [jax.random.normal(k) for k in jax.random.split(key, SLOTS)]
  assert len({float(x) for x in draws}) == SLOTS
  np.testing.assert_allclose(
    loss(None, unit, key)[0], np.mean(draws), rtol=1e-5
  )


# A run, from files to its result.

NUM_USERS = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """Files of 24 users, the first with 60 examples, and two held-out ones."""
  directory = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(2)
  for prefix, ids in (
    (
      "train",
      [0] * 60 + [u for u in range(1, NUM_USERS) for _ in range(u % 6 + 1)],
    ),
    ("test", [100] * 9 + [101] * 4),
  ):
    targets = rng.integers(0, 3, len(ids))
    inputs = rng.normal(size=(len(ids), 4)) + 2 * np.eye(3, 4)[targets]
    np.savez(
      directory / f"{prefix}.npz",
      inputs=inputs.astype(np.float32),
      targets=targets.astype(np.int32),
      user=np.array([f"user {i:03}" for i in ids]),
    )
  return directory


def _config(directory, **changes):
  config = config_lib.default()
  config.data.name, config.data.path = "npz", str(directory)
  config.data.examples_per_unit = 3
  config.model.num_outputs, config.model.width = 3, 16
  config.privacy.unit = "user"
  config.privacy.num_examples = NUM_USERS
  config.privacy.expected_batch_size = 12
  config.privacy.num_steps = 12
  config.privacy.noise_multiplier = 1.0
  config.privacy.target_delta = 1e-3
  config.checkpoint_every = 4
  config.eval_every = 6
  config.insecure_seed = 7
  config.update_from_flattened_dict(changes)
  return config


def _note_reads(monkeypatch):
  """Of the examples to train on, all that are read from now on."""
  reads = []
  read = arrays_lib.ArraySource.read

  def noted(self, indices):
    if len(self) > 100:
      reads.extend(indices.tolist())
    return read(self, indices)

  monkeypatch.setattr(arrays_lib.ArraySource, "read", noted)
  return reads


@pytest.fixture(scope="module")
def finished(directory, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished")
  with pytest.MonkeyPatch.context() as patch:
    reads = _note_reads(patch)
    # It reads all rows, before the first step.
    patch.setattr(data_checks, "shared_rows", lambda *_: "")
    result = dpdist.train(_config(directory), workdir)
  return workdir, result, reads


@pytest.mark.slow
def test_a_run_spends_what_the_plan_of_its_users_says(finished):
  workdir, result, _ = finished
  assert result["sampling_probability"] == 12 / NUM_USERS
  assert result["num_steps"] == 12
  assert result["epsilon"] == dpdist.accounting.epsilon(
    noise_multiplier=1.0,
    sampling_probability=12 / NUM_USERS,
    num_steps=12,
    delta=1e-3,
  )
  assert result["test"]["accuracy"] > 0.5  # Of three classes.
  findings = verify.verify(workdir, ledger.Ledger(workdir / "ledger"))
  assert not [f for f in findings if f.problem]


@pytest.mark.slow
def test_a_user_with_many_examples_lends_others_at_each_step(finished):
  _, _, reads = finished
  mine = [i for i in reads[1:] if i < 60]  # The first is for shapes alone.
  # Three a step in at most twelve: in more steps than one, and not the same.
  assert 9 <= len(mine) <= 36
  assert len(set(mine)) > 6


@pytest.mark.slow
def test_a_resumed_run_chooses_as_if_it_had_not_stopped(
  directory, finished, tmp_path, monkeypatch
):
  _, result, _ = finished
  sample = sampling.PoissonSampler.__call__

  def crash(self, step):
    if step == 9:
      raise InterruptedError
    return sample(self, step)

  with monkeypatch.context() as patch:
    patch.setattr(sampling.PoissonSampler, "__call__", crash)
    with pytest.raises(InterruptedError):
      dpdist.train(_config(directory), tmp_path)
  again = dpdist.train(_config(directory), tmp_path)
  assert again["params_sha256"] == result["params_sha256"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"privacy.unit": "example"}, "privacy.unit must be 'user' with .*unit=3"),
    ({"data.examples_per_unit": 0}, "privacy.unit must be 'example' with .*=0"),
    (
      {"privacy.num_examples": 167},
      "num_examples must be the number of users to train on, 24, got 167",
    ),
    ({"data.unit_column": "who"}, r"data\.unit_column .* got 'who'"),
  ],
)
def test_bad_settings_are_named_before_anything_is_spent(
  directory, tmp_path, changes, message
):
  with pytest.raises(errors.SettingsError, match=message):
    dpdist.train(_config(directory, **changes), tmp_path)
  assert not (tmp_path / "checkpoints").exists()


def test_shapes_that_are_compiled_for_are_those_that_are_read(directory):
  config = _config(directory)
  row = datasets.load(config.data).train.read(np.arange(1))
  example = abstract_step.example(setup.build(config))
  found = abstract_step.unit(config, example)
  assert {k: (x.shape[1:], x.dtype) for k, x in row.items()} == {
    k: (x.shape, x.dtype) for k, x in found.items()
  }
  assert example["inputs"].shape == (4,)
  config.data.examples_per_unit = 0
  assert abstract_step.unit(config, example) == example


# Chit-chat.


def _write_chat(path, users):
  """Conversations of each user with an answering machine."""
  chat = {}
  for number, (user, texts) in enumerate(users.items()):
    said = [{"text": x, "sender": user} for x in texts]
    answer = [{"text": "!!!!!", "sender": "machine"}]
    chat[str(number)] = {"messages": [said, answer]}
  path.write_text(json.dumps(chat))


def _load_chat(path, **changes):
  fields = {"sequence_length": 3, "examples_per_unit": 2}
  return chitchat.load(path, **(fields | changes))


def _everything(source):
  return source.read(np.arange(len(source)))


def test_a_piece_of_chat_is_of_one_users_words(tmp_path):
  path = tmp_path / "dataset.json"
  letters = {f"name {i}": chr(97 + i) for i in range(20)}
  # Of lengths 1 to 20, in two messages: 0 to 5 pieces of 4 bytes.
  chat = {n: [x, x * (i - 1)] if i > 1 else [x] * (i + 1)
          for i, (n, x) in enumerate(letters.items())}  # fmt: skip
  _write_chat(path, chat)
  train, test = _load_chat(path)
  batch = _everything(train)
  seen = []
  for row, is_empty in zip(
    batch["inputs"], batch[users_lib.SLOT_IS_EMPTY], strict=True
  ):
    words = {*bytes(row[~is_empty].ravel().tolist())} - {ord("\n")}
    assert len(words) == (not is_empty.all())
    seen += words
  held_out = {*bytes(_everything(test)["inputs"].ravel().tolist())} - {10}
  assert held_out
  assert len({*seen} | held_out) == len(seen) + len(held_out)  # None in two.
  # Who wrote less than a piece is a user all the same.
  assert batch[users_lib.SLOT_IS_EMPTY].all(1).any()
  for part in (batch, _everything(test)):
    np.testing.assert_array_equal(
      part["targets"][..., :-1], part["inputs"][..., 1:]
    )


def test_a_held_out_user_has_no_more_pieces_than_slots(tmp_path):
  path = tmp_path / "dataset.json"
  names = [f"{i:02}" for i in range(12)]
  _write_chat(path, {name: [name * 40] for name in names})
  for slots in (1, 5):
    _, test = _load_chat(path, examples_per_unit=slots)
    pieces = [bytes(x.tolist()) for x in _everything(test)["inputs"]]
    counts = [pieces.count(piece) for piece in {*pieces}]
    assert max(counts) == slots
    assert len(counts) < 12


def test_who_is_held_out_depends_on_nobody_else(tmp_path):
  def parts(names):
    path = tmp_path / "dataset.json"
    _write_chat(path, {name: [name] for name in names})
    train, test = _load_chat(path, sequence_length=5)
    found = [train.examples, test]
    return [
      {bytes(x.tolist()) for x in s.read(np.arange(len(s)))["inputs"]}
      for s in found
    ]

  names = [f"{i:06}" for i in range(0, 600, 10)]  # A piece each.
  train, test = parts(names)
  fewer_train, fewer_test = parts(names[1:])
  assert fewer_train <= train
  assert fewer_test <= test
  assert len(train | test) - len(fewer_train | fewer_test) == 1
  assert 4 <= len(test) <= 24


@pytest.mark.parametrize(
  ("text", "changes", "message"),
  [
    ("{}", {}, "sequence_length must leave pieces of users in both parts"),
    ("[]", {}, "must be Chit-chat's dataset.json, got .*: AttributeError"),
    ("{", {}, "must be Chit-chat's dataset.json, got .*: JSONDecodeError"),
    ('{"a": {}}', {}, "must be Chit-chat's dataset.json, got .*: KeyError"),
    ("{}", {"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
  ],
)
def test_what_is_not_chitchat_is_refused(tmp_path, text, changes, message):
  path = tmp_path / "dataset.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    _load_chat(path, **changes)


def test_chitchat_as_it_was_fetched():
  try:
    path = fetch.find("chitchat") / "dataset.json"
  except ValueError as error:
    pytest.skip(str(error))
  from configs import chitchat_users

  config = chitchat_users.get_config()
  train, test = chitchat.load(
    path,
    sequence_length=config.data.sequence_length,
    examples_per_unit=config.data.examples_per_unit,
  )
  counts = np.bincount(train.unit_of_example, minlength=len(train))
  assert len(train) == config.privacy.num_examples == 1068
  assert counts.max() > 10_000  # The heavy tail.
  assert (counts == 0).sum() == 81
  assert len(test) == 816
  assert data_checks.one_example(train)["inputs"].shape == (64,)

"""Tests of dpdist.data.users: whose examples are read, and which of them."""

import threading

import ml_collections
import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from dpdist import sampling
from dpdist.data import array_record
from dpdist.data import arrays as arrays_lib
from dpdist.data import pipeline
from dpdist.data import sources
from dpdist.data import users as users_lib
from dpdist.data.datasets import datasets

# Of users 0 to 5: none, one, as many as slots, more, as many more, very many.
OWNERS = np.array([5] * 3 + [1] + [2] * 3 + [3] * 5 + [5] * 37 + [4] * 5)
SLOTS = 3
KEY = bytes(range(32))


def examples():
  """No example is zero, so that an empty slot can be told from one."""
  numbers = np.arange(1, len(OWNERS) + 1)
  return arrays_lib.ArraySource({"inputs": np.stack([numbers, -numbers], 1)})


def users(source=None, slots=SLOTS):
  return users_lib.UserSource(source or examples(), OWNERS, 6, slots)


def slots_of(batch):
  """By row, the examples in its slots, after a look at the empty ones."""
  found = batch["inputs"][..., 0]
  np.testing.assert_array_equal(found == 0, batch[users_lib.SLOT_IS_EMPTY])
  np.testing.assert_array_equal(found, -batch["inputs"][..., 1])
  return [sorted(int(x) - 1 for x in row if x) for row in found]


def test_a_row_holds_a_users_examples_and_no_others():
  source = users()
  batch = source.read(np.array([5, 1, 0, 2, 3]))
  assert batch["inputs"].shape == (5, SLOTS, 2)
  assert batch[users_lib.SLOT_IS_EMPTY].dtype == np.bool_
  assert slots_of(batch) == [[0, 1, 2], [3], [], [4, 5, 6], [7, 8, 9]]
  none = source.read(np.array([], np.int64))
  assert none["inputs"].shape == (0, SLOTS, 2)
  assert none[users_lib.SLOT_IS_EMPTY].shape == (0, SLOTS)


def test_a_choice_is_of_a_users_own_examples_none_twice():
  at = users().drawing(KEY)
  for step in range(50):
    rows = slots_of(at(step).read(np.arange(6)))
    for user, row in enumerate(rows):
      assert len(set(row)) == min(SLOTS, np.sum(user == OWNERS))
      assert (OWNERS[row] == user).all()


def test_a_choice_depends_on_key_step_and_user_alone():
  at = users().drawing(KEY)
  whole = slots_of(at(7).read(np.arange(6)))
  again = slots_of(users().drawing(KEY)(7).read(np.array([3, 5])))
  assert again == [whole[3], whole[5]]
  others = [
    users().drawing(KEY[::-1])(7),
    *(at(step) for step in range(7)),
  ]
  for other in others:
    assert slots_of(other.read(np.array([5]))) != [whole[5]]


def test_a_choice_is_uniform_over_time_and_apart_from_other_users():
  at = users().drawing(KEY)
  counts, pairs = np.zeros(len(OWNERS)), np.zeros((5, 5))
  num_alike = 0
  for step in range(4000):
    few, other, many = slots_of(at(step).read(np.array([3, 4, 5])))
    counts[few + many] += 1
    few, other = np.array(few) - 7, np.array(other) - 49
    pairs[np.ix_(few, few)] += 1
    num_alike += (few == other).all()
  # Each of 5 in 3 slots, of 40 in 3, and each two of 5: in standard deviations.
  for found, p in (
    (counts[OWNERS == 3], 3 / 5),
    (counts[OWNERS == 5], 3 / 40),
    (pairs[np.triu_indices(5, 1)], 3 / 10),
    # Two users of 5 take the same places by chance alone.
    (num_alike, 1 / 10),
  ):
    deviation = (found - 4000 * p) / np.sqrt(4000 * p * (1 - p))
    assert np.abs(deviation).max() < 4.5


class Noted:
  """Examples of which one knows what was read."""

  def __init__(self):
    self._source = examples()
    self._lock = threading.Lock()
    self.reads = []

  def __len__(self):
    return len(self._source)

  def read(self, indices):
    with self._lock:
      self.reads += indices.tolist()
    return self._source.read(indices)


def test_hosts_read_the_examples_of_their_own_users_alone():
  sampler = sampling.PoissonSampler(
    num_examples=6, sampling_probability=0.6, seed=1
  )

  def steps(rows):
    source = Noted()
    chunks = pipeline.steps(
      users(source).drawing(KEY),
      sampler,
      start_step=0,
      num_steps=20,
      chunk_size=4,
      rows=rows,
    )
    return source, [chunk for _, chunks in chunks for chunk in chunks]

  _, whole = steps(np.arange(4))
  for rows in (np.array([0, 3]), np.array([1, 2])):
    source, mine = steps(rows)
    assert len(mine) == len(whole)
    read = []
    for part, chunk in zip(mine, whole, strict=True):
      for name, array in chunk.batch.items():
        np.testing.assert_array_equal(part.batch[name], array[rows])
      found = part.batch["inputs"][..., 0]
      read += (found[found > 0] - 1).tolist()
    assert sorted(source.reads) == sorted(read)


def test_manifest_covers_whose_an_example_is():
  def of(owners, num_units=6, slots=SLOTS, numbers=1):
    array = np.arange(len(owners)) + numbers
    source = arrays_lib.ArraySource({"inputs": array})
    return users_lib.UserSource(
      source, owners, num_units, slots
    ).content_digest()

  moved = OWNERS.copy()
  moved[0] = 1
  others = [of(moved), of(OWNERS, num_units=7), of(OWNERS, numbers=2)]
  assert len({of(OWNERS), *others}) == 4
  assert of(OWNERS, slots=5) == of(OWNERS.astype(np.int32)) == of(OWNERS)
  assert users().content_digest() != examples().content_digest()
  assert users().drawing(KEY)(3).content_digest() == users().content_digest()


def test_units_pass_on_what_is_asked_of_their_examples(tmp_path):
  class Source(arrays_lib.ArraySource):
    def earlier_digests(self):
      return ["e" * 64]

    def changed_files(self):
      return ["train.array_record"]

  def of(examples):
    return users_lib.UserSource(examples, OWNERS, 6, SLOTS)

  arrays = {"inputs": np.arange(len(OWNERS))}
  source = of(Source(arrays))
  assert sources.changed_files(source) == ["train.array_record"]
  # As it would be, were that the digest of the examples.
  other = Source(arrays)
  other._digest = "e" * 64
  assert sources.earlier_digests(source) == [of(other).content_digest()]
  plain = of(arrays_lib.ArraySource(arrays))
  assert sources.earlier_digests(plain) == []
  assert sources.changed_files(plain) == []


def test_users_are_numbered_in_order_of_their_identities():
  for ids in (["b", "a", "c", "a"], [7, -2, 10, -2]):
    owners, count = users_lib.number(np.array(ids), name="user")
    assert owners.tolist() == [1, 0, 2, 0]
    assert count == 3


# Files.


def _config(directory, name="npz", **changes):
  fields = {
    "name": name,
    "path": str(directory),
    "unit_column": "user",
    "examples_per_unit": 2,
    "inputs_column": "inputs",
    "targets_column": "targets",
    "sequence_length": 4,
  }
  return ml_collections.ConfigDict(fields | changes)


def _rows(train=("bo", "al", "bo", "cy"), test=("di", "di")):
  numbers = np.arange(len(train) + len(test))
  ids = np.array([*train, *test])
  parts = slice(0, len(train)), slice(len(train), None)
  return [
    {"inputs": numbers[p] + 1, "targets": numbers[p] % 2, "user": ids[p]}
    for p in parts
  ]


def _write(directory, name, parts):
  for prefix, part in zip(("train", "test"), parts, strict=True):
    if name == "npz":
      np.savez(directory / f"{prefix}.npz", **part)
    elif name == "parquet":
      columns = {k: x.tolist() for k, x in part.items()}
      parquet.write_table(
        pyarrow.table(columns), directory / f"{prefix}.parquet"
      )
    else:
      part = dict(part)
      np.save(directory / f"{prefix}_user.npy", part.pop("user"))
      array_record.write_array_record(
        directory / f"{prefix}.array_record",
        [
          {k: x[i] for k, x in part.items()} for i in range(len(part["inputs"]))
        ],
      )


@pytest.mark.parametrize("name", ["npz", "parquet", "array_record"])
def test_files_say_whose_an_example_is(tmp_path, name):
  _write(tmp_path, name, _rows())
  dataset = datasets.load(_config(tmp_path, name))
  train, test = dataset.train, dataset.test
  assert len(train) == 3
  batch = train.read(np.arange(3))
  assert batch["inputs"].tolist() == [[2, 0], [1, 3], [4, 0]]
  assert batch[users_lib.SLOT_IS_EMPTY].tolist() == [[0, 1], [0, 0], [0, 1]]
  # What is held out stays examples.
  held_out = test.read(np.arange(2))
  assert held_out["inputs"].tolist() == [5, 6]
  assert held_out.keys() == {"inputs", "targets"}


def test_identities_may_be_in_a_dictionary_and_in_two_files(tmp_path):
  rows, test = _rows()
  for number, part in enumerate((slice(0, 3), slice(3, None))):
    columns = {k: pyarrow.array(x[part]) for k, x in rows.items()}
    columns["user"] = columns["user"].dictionary_encode()
    parquet.write_table(
      pyarrow.table(columns), tmp_path / f"train{number}.parquet"
    )
  parquet.write_table(pyarrow.table(test), tmp_path / "test.parquet")
  train = datasets.load(_config(tmp_path, "parquet")).train
  batch = train.read(np.arange(3))
  assert batch["inputs"].tolist() == [[2, 0], [1, 3], [4, 0]]


def test_integers_name_users_too(tmp_path):
  _write(tmp_path, "parquet", _rows((7, 7, -1), (8,)))
  train = datasets.load(_config(tmp_path, "parquet")).train
  assert train.read(np.arange(2))["inputs"].tolist() == [[3, 0], [1, 2]]


# Bad input.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"examples_per_unit": 0},
      "examples_per_unit must be an integer >= 1, got 0",
    ),
    ({"num_units": 0}, "num_units must be an integer >= 1, got 0"),
    ({"num_units": 5}, r"unit_of_example must be in \[0, num_units=5\), got 1"),
    ({"unit_of_example": OWNERS - 2}, "unit_of_example must be in .* got -1"),
    (
      {"unit_of_example": OWNERS[1:]},
      "one integer for each of the 54 examples",
    ),
    ({"unit_of_example": OWNERS / 1}, "one integer for each .* got float64"),
  ],
)
def test_bad_units_are_refused(changes, message):
  fields = {
    "examples": examples(),
    "unit_of_example": OWNERS,
    "num_units": 6,
    "examples_per_unit": SLOTS,
  }
  with pytest.raises(ValueError, match=message):
    users_lib.UserSource(**(fields | changes))


def test_an_array_with_the_name_of_the_mask_is_refused():
  array = np.zeros(len(OWNERS))
  source = arrays_lib.ArraySource({users_lib.SLOT_IS_EMPTY: array})
  with pytest.raises(ValueError, match="no array named 'is_empty_slot'"):
    users(source).read(np.array([1]))


@pytest.mark.parametrize("index", [-1, 6])
def test_a_user_who_is_not_there_is_refused_and_not_named(index):
  with pytest.raises(ValueError, match=r"indices must be in \[0, 6\)$"):
    users().read(np.array([index]))


@pytest.mark.parametrize(
  ("name", "train", "changes", "message"),
  [
    ("npz", ("di", "al"), {}, "no user in both parts.* got 1 who are"),
    (
      "npz",
      ("a",),
      {"unit_column": "who"},
      "unit_column must be one of .*'who'",
    ),
    ("npz", (1.5,), {}, r"unit_column='user' must hold an integer or a string"),
    ("npz", ("a",), {"examples_per_unit": -1}, "examples_per_unit .* got -1"),
    (
      "npz",
      ("a",),
      {"name": "digits"},
      "examples_per_unit must be 0 for .*dig",
    ),
    (
      "npz",
      ("a",),
      {"name": "chitchat", "examples_per_unit": 0},
      "examples_per_unit must be at least 1 for data.name='chitchat'",
    ),
    (
      "parquet",
      ("a",),
      {"unit_column": "who"},
      "unit_column must be one of .*'who'",
    ),
    (
      "parquet",
      ("a", None),
      {},
      "integers or strings and no nulls, .* 1 nulls",
    ),
    ("parquet", (1.5,), {}, "integers or strings and no nulls, got double"),
    (
      "array_record",
      ("a",),
      {"unit_column": "who"},
      "a directory with train_who.npy",
    ),
  ],
)
def test_bad_grouping_is_refused(tmp_path, name, train, changes, message):
  test = ("di",) if isinstance(train[0], str) else (3.5,)
  parts = _rows(train, test)
  if None in train:
    parts[0]["user"] = np.array(train, object)
  _write(tmp_path, name, parts)
  with pytest.raises(ValueError, match=message):
    datasets.load(_config(tmp_path, **({"name": name} | changes)))


def test_identities_for_other_than_all_examples_are_refused(tmp_path):
  _write(tmp_path, "array_record", _rows())
  np.save(tmp_path / "train_user.npy", np.array(["a"]))
  with pytest.raises(ValueError, match="each of the 4 examples whose it is"):
    datasets.load(_config(tmp_path, "array_record"))

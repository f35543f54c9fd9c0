"""What all of `dpdist.data.from_*` share: options, digests and the split."""

import math
import subprocess
import sys

import numpy as np
import pytest

from dpdist import data
from dpdist import errors
from dpdist.data import dataset as dataset_lib
from dpdist.data import sources
from dpdist.data import users as users_lib

_RNG = np.random.default_rng(0)
_ROWS = 60


def _columns(**changes):
  """Sixty examples, of nine users; some columns are texts."""
  rng = np.random.default_rng(1)
  return {
    "age": rng.integers(18, 90, _ROWS).astype(np.float64),
    "weight": rng.normal(70, 10, _ROWS),
    "job": [("nurse", "cook", "pilot")[i % 3] for i in range(_ROWS)],
    "label": [("no", "yes")[i % 2] for i in range(_ROWS)],
    "who": [f"u{i % 9}" for i in range(_ROWS)],
  } | changes


def _one(columns=None, **options):
  """What is read of a few rows that are all trained on."""
  columns = columns or {"inputs": [1.0, 2.0, 3.0]}
  return everything(data.from_arrays(columns, test=columns, **options).train)


def everything(source):
  return source.read(np.arange(len(source)))


def _rows(source):
  """Its rows, whatever their order."""
  arrays = everything(source)
  return sorted(
    str([arrays[name][i].tolist() for name in sorted(arrays)])
    for i in range(len(source))
  )


# What the arrays of an example are.


def test_columns_have_their_own_names_if_none_are_asked_for():
  batch = _one({"x": np.ones((3, 2)), "y": [1, 2, 3]})
  assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
    "x": ((3, 2), "float32"),
    "y": ((3,), "int32"),
  }


def test_several_columns_are_joined_in_the_order_given():
  columns = {"a": [1.0, 2.0], "b": [[3, 4], [5, 6]], "c": [True, False]}
  batch = _one(columns, inputs=["b", "c", "a"], targets=["a", "c"])
  np.testing.assert_array_equal(batch["inputs"], [[3, 4, 1, 1], [5, 6, 0, 2]])
  np.testing.assert_array_equal(batch["targets"], [[1, 1], [2, 0]])
  assert {x.dtype for x in batch.values()} == {np.dtype(np.float32)}


def test_inputs_may_be_several_arrays():
  columns = {"q": [1, 2], "d": [3, 4], "w": [0.5, 1.0], "y": [0, 1]}
  batch = _one(columns, inputs={"query": "q", "rest": ["d", "w"]}, targets="y")
  assert sorted(batch) == ["query", "rest", "targets"]
  np.testing.assert_array_equal(batch["rest"], [[3.0, 0.5], [4, 1]])


def test_classes_are_numbered_as_declared_and_others_are_no_label():
  columns = {"x": [0.0] * 4, "y": ["dog", "cat", " dog ", "wolf"]}
  options = {"inputs": "x", "targets": "y", "classes": ["cat", "dog"]}
  batch = _one(columns, **options)
  np.testing.assert_array_equal(batch["targets"], [1, 0, 1, -1])
  assert batch["targets"].dtype == np.int32
  batch = _one(columns, **options, one_hot=True)
  np.testing.assert_array_equal(
    batch["targets"], [[0, 1], [1, 0], [0, 1], [0, 0]]
  )


def test_classes_may_be_numbers():
  columns = {"x": [0.0] * 3, "y": [7.0, 5.0, 6.0]}
  batch = _one(columns, inputs="x", targets="y", classes=range(5, 7))
  np.testing.assert_array_equal(batch["targets"], [-1, 0, 1])


def test_categories_become_places_and_an_unlisted_value_none():
  columns = {"age": [1.0, 2.0, 3.0], "job": ["cook", "king", "nurse"]}
  batch = _one(
    columns, inputs=["job", "age"], categories={"job": ["nurse", "cook"]}
  )
  np.testing.assert_array_equal(
    batch["inputs"], [[0, 1, 1], [0, 0, 2], [1, 0, 3]]
  )


def test_public_statistics_scale_and_missing_fills():
  columns = {
    "age": [30.0, np.nan, 50.0],
    "pixels": np.full((3, 4), 51, np.uint8),
  }
  batch = _one(
    columns,
    inputs={"age": "age", "pixels": "pixels"},
    missing=40,
    public_statistics={"age": (40, 10), "pixels": ([0.1] * 4, 0.1)},
    scale_uint8=True,
  )
  np.testing.assert_array_equal(batch["age"], np.float32([-1, 0, 1]))
  np.testing.assert_allclose(batch["pixels"], np.full((3, 4), 1), rtol=1e-6)
  assert batch["pixels"].dtype == np.float32


def test_nothing_is_computed_from_the_training_rows():
  """One row changed in any way changes no other, however extreme it is."""
  parts = [
    _one(
      {"x": [1.0, 2.0, x], "job": ["a", "b", job], "y": ["no", "yes", label]},
      inputs=["x", "job"],
      targets="y",
      classes=["no", "yes"],
      categories={"job": ["a", "b"]},
      public_statistics={"x": (1.0, 2.0)},
      missing=0.0,
    )
    for x, job, label in (
      (3.0, "a", "no"),
      (1e30, "z", "maybe"),
      (np.nan, "", ""),
    )
  ]
  for other in parts[1:]:
    for name, values in parts[0].items():
      np.testing.assert_array_equal(values[:2], other[name][:2])
      assert values.dtype == other[name].dtype


def test_texts_become_tokens_of_one_length():
  columns = {"text": ["abcdef", "", "b"], "tags": [[1, 2, 3], [], [9] * 9]}
  batch = _one(
    columns,
    inputs="text",
    targets="tags",
    tokenizers={"text": lambda text: [ord(letter) for letter in text]},
    sequence_length={"text": 4, "tags": 4},
    padding=7,
  )
  np.testing.assert_array_equal(
    batch["inputs"], [[97, 98, 99, 100], [7, 7, 7, 7], [98, 7, 7, 7]]
  )
  np.testing.assert_array_equal(
    batch["targets"], [[1, 2, 3, -1], [-1, -1, -1, -1], [9, 9, 9, 9]]
  )


def test_map_makes_the_arrays_of_one_example():
  def function(example):
    tokens = np.array([len(word) for word in example["inputs"].split()])
    return {"inputs": tokens[:2], "length": np.float64(len(tokens))}

  batch = _one({"t": ["a bcd e", "ab c"]}, inputs="t", map=function)
  np.testing.assert_array_equal(batch["inputs"], [[1, 3], [2, 1]])
  np.testing.assert_array_equal(batch["length"], np.float32([3, 2]))


def test_map_gets_a_key_that_is_the_examples_own():
  """Whatever its place, its neighbours and the call; no two have the same."""

  def function(example, key):
    noise = np.random.default_rng(int.from_bytes(key)).normal(size=2)
    return {**example, "noise": noise}

  columns = {"x": np.arange(6.0)}
  all_at_once = _one(columns, inputs="x", map=function)["noise"]
  assert len(np.unique(all_at_once, axis=0)) == 6
  turned = {"x": columns["x"][::-1]}
  source = data.from_arrays(turned, test=turned, inputs="x", map=function).train
  for i in range(6):
    one = source.read(np.array([5 - i]))["noise"]
    np.testing.assert_array_equal(one[0], all_at_once[i])


def test_a_map_that_writes_into_its_argument_changes_no_data():
  def function(example):
    example["x"] += 1
    return example

  columns = {"x": np.zeros((3, 2))}
  source = data.from_arrays(columns, test=columns, map=function).train
  for _ in range(2):
    np.testing.assert_array_equal(everything(source)["x"], np.ones((3, 2)))
  assert not columns["x"].any()


def test_no_rows_can_be_read_and_repeated_ones():
  source = data.from_arrays(
    {"x": np.ones((3, 2))}, test={"x": [[1.0, 2.0]]}
  ).train
  assert source.read(np.zeros(0, np.int64))["x"].shape == (0, 2)
  assert source.read(np.array([2, 2, 0]))["x"].shape == (3, 2)
  with pytest.raises(ValueError, match=r"must be in \[0, 3\)"):
    source.read(np.array([3]))


def test_examples_must_all_be_like_the_first():
  columns = {"text": ["a", "bb"]}
  dataset = data.from_arrays(
    columns, test=columns, map=lambda x: {"x": np.ones(len(x["text"]))}
  )
  dataset.train.read(np.array([0]))
  with pytest.raises(ValueError, match="dtypes of the first"):
    dataset.train.read(np.array([1]))


@pytest.mark.parametrize(
  "column",
  [
    [1, 2, 2.5],
    [1, 2, math.nan],
    [1, True],
    [1, "2"],
    [np.uint8(1), 2.0],
    [[1, 2], [1.0, 2.0]],
    [1, None],
  ],
)
def test_a_list_of_several_types_is_refused(column):
  """One row would decide how all are read, and in which part they are."""
  with pytest.raises(errors.ArgumentError, match=r"'x' must be .* of one type"):
    _one({"x": column})


# The digest of the content.


def test_digest_is_of_the_rows_in_their_order():
  digest = lambda columns, **options: data.from_arrays(
    columns, test=columns, **options
  ).train.content_digest()
  first = digest({"x": [1.0, 2.0], "y": ["a", "b"]})
  assert first == digest({"y": np.array(["a", "b"]), "x": np.array([1.0, 2.0])})
  for other in (
    {"x": [2.0, 1.0], "y": ["b", "a"]},
    {"x": [1.0, 2.0], "y": ["a", "c"]},
    {"x": [1, 2], "y": ["a", "b"]},
    {"x": [1.0, 2.0, 2.0], "y": ["a", "b", "b"]},
    {"x": [[1.0], [2.0]], "y": ["a", "b"]},
  ):
    assert digest(other) != first


def test_digest_of_a_part_is_that_of_its_rows_alone():
  """Whether it was found in the pass that splits, or is computed later."""
  columns = _columns()
  options = {"inputs": ["age", "weight"]}
  dataset = data.from_arrays(columns, test_fraction=0.3, **options)
  for part in dataset.train, dataset.test:
    rows = [
      i
      for i, age in enumerate(columns["age"])
      if [age, columns["weight"][i]] in everything(part)["inputs"].tolist()
      or np.float32([age, columns["weight"][i]]).tolist()
      in everything(part)["inputs"].tolist()
    ]
    assert len(rows) == len(part)
    alone = {name: np.asarray(x)[rows] for name, x in columns.items()}
    again = data.from_arrays(alone, test=alone, **options).train
    assert again.content_digest() == part.content_digest()


def test_digest_stays_under_another_encoding_which_has_its_own():
  """Or whoever scales their data anew would have a new budget for it."""
  make = lambda **options: (
    data.from_arrays(
      _columns(), test_fraction=0.5, inputs=["age"], **options
    ).train
  )
  first = make()
  for options in (
    {"public_statistics": {"age": (1.0, 2.0)}},
    {"missing": 3.0},
    {"targets": "age"},
  ):
    other = make(**options)
    assert other.content_digest() == first.content_digest()
    assert other.encoding_digest() != first.encoding_digest()
  assert make().encoding_digest() == first.encoding_digest()


def test_functions_that_decide_what_examples_are_can_be_found():
  function = lambda example: example
  columns = {"x": [1.0]}
  made = data.from_arrays(columns, test=columns, map=function)
  assert made.train.functions == [function]
  assert function in dataset_lib.code(made)


def test_a_mapped_file_that_changes_is_noticed(tmp_path):
  np.save(tmp_path / "x.npy", np.arange(10.0))
  columns = {"x": np.load(tmp_path / "x.npy", mmap_mode="r")}
  source = data.from_arrays(columns, test_fraction=0.5).train
  assert not sources.changed_files(source)
  np.save(tmp_path / "x.npy", np.arange(10.0) + 1)
  assert sources.changed_files(source) == [str(tmp_path / "x.npy")]


# The split.

_GOLDEN_ROWS = [1.0, 3.0]
_GOLDEN_USERS = ["u0", "u4", "u12", "u13", "u17"]


def test_the_split_is_the_same_for_ever():
  """Another one would release what was protected. Never change this."""
  dataset = data.from_arrays(
    {"x": np.arange(20.0), "y": np.arange(20, dtype=np.int32)},
    test_fraction=0.2,
  )
  assert everything(dataset.test)["x"].tolist() == _GOLDEN_ROWS
  dataset = data.from_arrays(
    {"x": np.arange(20.0), "who": [f"u{i}" for i in range(20)]},
    inputs="x", users="who", test_fraction=0.2,
  )  # fmt: skip
  assert dataset.test_users.tolist() == _GOLDEN_USERS


def test_the_digest_is_the_same_for_ever():
  """Budgets of data sets are kept under it."""
  columns = {
    "x": np.arange(3.0),
    "y": np.arange(6, dtype=np.int8).reshape(3, 2),
    "z": ["a", "", "\N{SNOWMAN}"],
    "b": [True, False, True],
  }
  source = data.from_arrays(
    columns, test=columns, categories={"z": ["a"]}
  ).train
  assert source.content_digest() == (
    "24239bc859667c8d8c975326f0a25c4f8b850d649d59bbff337a982c27a08cd6"
  )


def test_other_rows_never_move_a_row():
  """Neither their order, nor that they come or go."""
  columns = _columns()
  options = {"inputs": ["age", "weight"], "test_fraction": 0.3}
  whole = data.from_arrays(columns, **options)
  order = _RNG.permutation(_ROWS)
  turned = {name: np.asarray(x)[order] for name, x in columns.items()}
  for other, is_whole in ((turned, True), ({
    name: x[:31] for name, x in columns.items()
  }, False)):  # fmt: skip
    parts = data.from_arrays(other, **options)
    for name in ("train", "test"):
      there, here = _rows(getattr(whole, name)), _rows(getattr(parts, name))
      assert {*here} <= {*there}
      assert here == there or not is_whole


def test_the_split_has_about_the_fraction():
  dataset = data.from_arrays({"x": np.arange(20_000.0)}, test_fraction=0.25)
  # Within four standard deviations.
  assert abs(len(dataset.test) - 5_000) < 4 * np.sqrt(20_000 * 0.25 * 0.75)
  assert len(dataset.train) + len(dataset.test) == 20_000


def test_a_larger_fraction_holds_out_the_same_rows_and_more():
  make = lambda fraction: {
    *_rows(
      data.from_arrays({"x": np.arange(99.0)}, test_fraction=fraction).test
    )
  }
  assert make(0.1) < make(0.3)


def test_split_by_keeps_the_split_under_other_inputs():
  columns = _columns(id=[str(i) for i in range(_ROWS)])
  ages = []
  for inputs in (["age"], ["age", "weight"]):
    dataset = data.from_arrays(
      columns, inputs=inputs, split_by="id", test_fraction=0.3
    )
    ages.append(everything(dataset.test)["inputs"][:, 0].tolist())
    assert dataset.train_users is None
  assert ages[0] == ages[1]
  without = data.from_arrays(columns, inputs=["age"], test_fraction=0.3)
  assert everything(without.test)["inputs"][:, 0].tolist() != ages[0]


@pytest.mark.parametrize("kind", [str, int])
def test_a_user_is_in_one_part_with_all_examples(kind):
  """Guarantee: users are kept whole."""
  whose = np.array([i % 9 for i in range(_ROWS)]).astype(kind)
  columns = _columns(who=whose)
  dataset = data.from_arrays(
    columns, inputs="age", users="who", test_fraction=0.4
  )
  train, test = {*dataset.train_users.tolist()}, {*dataset.test_users.tolist()}
  assert train
  assert test
  assert not train & test
  assert train | test == {*whose.tolist()}
  for part, users in (
    (dataset.train, dataset.train_users),
    (dataset.test, dataset.test_users),
  ):
    assert len(users) == len(part)
    mine = [columns["age"][whose == user] for user in dict.fromkeys(users)]
    assert sorted(np.concatenate(mine)) == sorted(everything(part)["inputs"])


def test_a_number_and_its_text_are_the_same_user():
  parts = [
    data.from_arrays(
      {"x": np.arange(30.0), "who": np.arange(30).astype(kind)},
      inputs="x",
      users="who",
      test_fraction=0.5,
    )
    for kind in (np.int64, np.int32, str)
  ]
  assert len({tuple(everything(x.test)["inputs"]) for x in parts}) == 1


def test_a_user_in_both_given_parts_is_refused():
  columns = {"x": [1.0, 2.0], "who": ["a", "b"]}
  with pytest.raises(
    errors.ArgumentError, match=r"no user in both parts.*got 1"
  ):
    data.from_arrays(
      columns, test={"x": [3.0], "who": ["b"]}, inputs="x", users="who"
    )


def test_a_users_data_set_trains_users():
  dataset = data.from_arrays(
    _columns(), inputs="age", users="who", test_fraction=0.4
  )
  over = dataset.over_users(3, name="users")
  assert isinstance(over.train, users_lib.UserSource)
  assert len(over.train) == len({*dataset.train_users})
  assert over.train.read(np.arange(2))["inputs"].shape == (2, 3)


def test_num_examples_is_confirmed():
  options = {"inputs": "age", "test_fraction": 0.4}
  count = len(data.from_arrays(_columns(), **options).train)
  data.from_arrays(_columns(), **options, num_examples=count)
  with pytest.raises(
    errors.ArgumentError, match=f"number of training examples, {count}, got 7"
  ):
    data.from_arrays(_columns(), **options, num_examples=7)
  with pytest.raises(
    errors.ArgumentError, match=r"number of users to train on, \d, got 60"
  ):
    data.from_arrays(_columns(), **options, users="who", num_examples=60)


# What is said of bad input.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({}, "test or test_fraction must say what is held out"),
    ({"test_fraction": 1.5}, r"test_fraction must be in \(0, 1\), got 1.5"),
    ({"test_fractoin": 0.5}, "did you mean 'test_fraction'"),
    ({"inputs": "height"}, r"inputs must name columns.*'age'.*got 'height'"),
    ({"inputs": []}, "inputs must name columns"),
    ({"targets": "label"}, "inputs must name the columns"),
    ({"inputs": "age", "users": "me"}, "users must name columns.*got 'me'"),
    ({"inputs": "job"}, "'inputs' must be an array of numbers.*categories"),
    ({"inputs": ["age", "job"]}, "column 'job' must hold numbers to be joined"),
    (
      {"inputs": "age", "one_hot": True},
      "classes must list the public classes",
    ),
    ({"inputs": "age", "classes": []}, r"classes must list values.*got \[\]"),
    ({"inputs": "age", "classes": 3}, "classes must list values.*got 3"),
    (
      {"inputs": "age", "classes": ["a", "a"]},
      "classes must list values, each",
    ),
    (
      {"inputs": "age", "classes": "abc"},
      "classes must list values.*got 'abc'",
    ),
    (
      {"inputs": "age", "categories": {"job": ["cook"]}},
      r"categories must be of columns that are inputs or targets, \['age'\]",
    ),
    (
      {"inputs": "age", "public_statistics": {"age": (1, 0)}},
      r"public_statistics\['age'\] must be \(mean, standard deviation\)",
    ),
    (
      {"inputs": "job", "tokenizers": {"job": len}},
      "sequence_length must say how many tokens 'job' has, got None",
    ),
    (
      {"inputs": "job", "tokenizers": {"job": "bpe"}, "sequence_length": 3},
      r"tokenizers\['job'\] must be a function, got 'bpe'",
    ),
    (
      {"inputs": "age", "sequence_length": {"job": 3}},
      "sequence_length must be of columns that are inputs or targets",
    ),
    (
      {"inputs": "age", "sequence_length": {"age": 0}},
      r"sequence_length\['age'\] must be an integer >= 1, got 0",
    ),
    ({"inputs": "age", "map": 3}, "map must be a function, got 3"),
    ({"inputs": "age", "image_size": 3}, "image_size must be"),
    ({"inputs": "age", "num_examples": 0}, "num_examples must be an integer"),
    ({"inputs": "age", "users": "age"}, "must hold an integer or a text"),
    (
      {"inputs": "age", "users": "who", "split_by": "job"},
      "split_by must not be given with users",
    ),
    ({"inputs": "age", "test_fraction": 1e-9}, "must leave a row or more"),
  ],
)
def test_bad_options_get_one_clear_sentence(options, message):
  if (
    options and "test_fraction" not in options and "fracto" not in str(options)
  ):
    options = {"test_fraction": 0.5, **options}
  with pytest.raises(ValueError, match=message):
    everything(data.from_arrays(_columns(), **options).train)


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({}, "arrays must be arrays of one leading length, one or more"),
    ({"x": [1, 2], "y": [1]}, "one leading length.*'y'"),
    ({"x": 3}, "one leading length"),
    ({"x": [object(), object()]}, "must hold numbers, texts, images"),
  ],
)
def test_bad_arrays_get_one_clear_sentence(arrays, message):
  with pytest.raises(ValueError, match=message):
    data.from_arrays(arrays, test_fraction=0.5)


def test_integers_that_jax_would_wrap_are_refused():
  with pytest.raises(ValueError, match="'x' must hold integers of 32 bits"):
    _one({"x": np.array([1, 2**40])})


def test_an_unknown_name_is_an_attribute_error():
  assert {"Dataset", "from_csv"} <= {*dir(data)}
  for name in data.__all__:
    assert getattr(data, name) is not None
  with pytest.raises(AttributeError, match="no attribute 'from_excel'"):
    _ = data.from_excel


def test_importing_it_imports_no_format():
  code = (
    "import sys, dpdist.data as d; d.from_csv, d.from_images, d.from_torch\n"
    "bad = {'pyarrow', 'PIL', 'datasets', 'torch', 'jax', 'grain'}\n"
    "assert not bad & {*sys.modules}, bad & {*sys.modules}"
  )
  subprocess.run([sys.executable, "-c", code], check=True)

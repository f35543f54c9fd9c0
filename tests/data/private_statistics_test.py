"""What one row or user can move private statistics by, and what they say."""

import math

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from dpdist import data
from dpdist import errors
from dpdist.data import queries
from dpdist.data import sources
from dpdist.data import statistics
from dpdist.data import users as users_lib
from dpdist.data.builders import encoding

_ANY = st.floats(width=64, allow_nan=True, allow_infinity=True)
_BOUNDS = [(-1.0, 1.0), (0.0, 120.0), (1e-300, 1e300), (-5e-290, 5e-290)]
_LIST = ("a", "b", "c")


def _statistics(bounds, bins):
  columns = [
    statistics.Column("c", queries.Counts(), (), _LIST),
    statistics.Column("q", queries.Quantiles(*bounds, bins=bins), (2,)),
    statistics.Column("s", queries.Standardized(*bounds), ()),
  ]
  return statistics.Statistics(tuple(columns))


def _norm2(vector):
  """The square of a norm, exact."""
  return sum(int(x) ** 2 for x in vector)


def _measured(rows):
  """Columns of rows, each of a number, two numbers, and a place."""
  return {
    "c": np.array([row[3] for row in rows], np.int32),
    "q": np.array([row[1:3] for row in rows], np.float64),
    "s": np.array([row[0] for row in rows], np.float64),
  }


def _sums(asked, rows, unit_of_row=None):
  units = None if unit_of_row is None else np.array(unit_of_row)
  read = lambda i: _measured([rows[j] for j in i])
  return np.array(asked.sums(read, len(rows), units), object)


_ROW = st.tuples(_ANY, _ANY, _ANY, st.integers(-1, 2))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  rows=st.lists(_ROW, min_size=1, max_size=6),
  bounds=st.sampled_from(_BOUNDS),
  bins=st.sampled_from([2, 7]),
)
def test_no_row_moves_the_sums_by_more_than_the_unit(rows, bounds, bins):
  """Whatever it holds, and by hardly less where it can."""
  asked = _statistics(bounds, bins)
  for row, vector in zip(rows, asked.vectors(_measured(rows)), strict=True):
    assert _norm2(vector) <= queries.UNIT**2
    others = [x for x in rows if x is not row]
    change = _sums(asked, rows) - (_sums(asked, others) if others else 0)
    if len(others) == len(rows) - 1:
      assert np.array_equal(change, vector)
  edge = asked.vectors(_measured([(math.inf, -math.inf, 0.0, 1)]))[0]
  assert _norm2(edge) > (1 - 1e-6) * queries.UNIT**2


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  rows=st.lists(_ROW, min_size=1, max_size=12),
  bounds=st.sampled_from(_BOUNDS),
  draw=st.data(),
)
def test_no_user_moves_them_either_however_many_rows_they_have(
  rows, bounds, draw
):
  asked = _statistics(bounds, 3)
  units = draw.draw(
    st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))
  )
  whole = _sums(asked, rows, units)
  for user in {*units}:
    kept = [i for i, unit in enumerate(units) if unit != user]
    without = 0
    if kept:
      without = _sums(asked, [rows[i] for i in kept], [units[i] for i in kept])
    assert _norm2(whole - without) <= queries.UNIT**2


@pytest.mark.parametrize("is_of_users", [False, True])
def test_sums_depend_on_no_order_and_no_block(monkeypatch, is_of_users):
  rng = np.random.default_rng(0)
  rows = [(*rng.normal(size=3), int(rng.integers(-1, 3))) for _ in range(50)]
  units = rng.integers(0, 7, 50) if is_of_users else None
  asked = _statistics((-1.0, 1.0), 4)
  whole = _sums(asked, rows, units)
  monkeypatch.setattr(statistics, "_BLOCK_ROWS", 3)
  assert np.array_equal(_sums(asked, rows, units), whole)
  order = rng.permutation(50)
  moved = [rows[i] for i in order]
  units = None if units is None else units[order]
  assert np.array_equal(_sums(asked, moved, units), whole)
  if is_of_users:
    # By hand: of each user the mean of the rows' vectors, towards zero.
    vectors = asked.vectors(_measured(moved))
    expected = 0
    for user in {*units}:
      mine = vectors[units == user].sum(axis=0)
      expected += np.trunc(mine / np.sum(units == user)).astype(np.int64)
    assert np.array_equal(whole, expected)


_COLUMNS = {
  "age": np.random.default_rng(0).normal(50, 10, 600),
  "pay": np.random.default_rng(1).exponential(2e4, 600),
  "job": ["cook"] * 300 + ["nurse"] * 295 + ["pilot"] * 5,
  "ill": ["no", "yes", "no"] * 200,
  "who": [f"p{i % 40}" for i in range(600)],
}
_OPTIONS = {
  "inputs": ["age", "pay", "job"],
  "targets": "ill",
  "classes": ["no", "yes"],
  "categories": {"job": ["cook", "nurse", "pilot", "judge"]},
  "test_fraction": 0.1,
  "private_statistics": {
    "age": data.Standardized(0, 120),
    "pay": data.Quantiles(0, 1e5, keep=(0.1, 0.9), bins=100),
    "job": data.Counts(at_least=20),
    "ill": data.Counts(),
  },
}


def _made(**changes):
  return data.from_arrays(_COLUMNS, **{**_OPTIONS, **changes})


def _answered(train, stddev=1.0):
  asked = sources.private_statistics(train)
  sums = asked.sums(train.measured, len(train))
  return asked.answers(sums, num_units=len(train), stddev=stddev)


def test_answers_are_those_of_the_rows_where_there_is_no_noise():
  made = _made()
  answers = _answered(made.train)
  raw = made.train.measured(np.arange(len(made.train)))
  assert answers["age"]["mean"] == pytest.approx(raw["age"].mean(), rel=1e-6)
  assert answers["age"]["deviation"] == pytest.approx(raw["age"].std(), 1e-5)
  between = answers["pay"]["lower"], answers["pay"]["upper"]
  # Bins are 1,000 apart.
  assert between == pytest.approx(np.quantile(raw["pay"], (0.1, 0.9)), abs=1e3)
  counted = np.bincount(raw["job"], minlength=4)
  assert answers["job"]["counts"] == pytest.approx(counted)
  assert answers["job"]["values"] == ["cook", "nurse", "pilot", "judge"]
  assert sum(answers["ill"]["counts"]) == pytest.approx(len(made.train))


def test_examples_are_made_with_bounds_until_answers_are_released():
  made = _made()
  before = made.train.read(np.arange(100))["inputs"]
  raw = made.train.measured(np.arange(100))
  np.testing.assert_allclose(before[:, 0], (raw["age"] - 60) / 60, rtol=1e-5)
  released = {
    "age": {"mean": 50.0, "deviation": 10.0},
    "pay": {"lower": 1e3, "upper": 5e4},
    "job": {"counts": [30.0, 20.0, 3.0, -1.0]},
    "ill": {"counts": [1.0, 1.0]},
  }
  for part in (made.train, made.test):
    after = part.with_statistics(released).read(np.arange(len(part)))["inputs"]
    raw = part.measured(np.arange(len(part)))
    np.testing.assert_allclose(after[:, 0], (raw["age"] - 50) / 10, rtol=1e-4)
    assert after[:, 1].min() == -1
    assert after[:, 1].max() == 1
    # Rare categories get no 1.
    np.testing.assert_array_equal(after[:, 2:4], np.eye(5)[raw["job"]][:, :2])
    assert not after[:, 4:].any()
  # The first source is as it was.
  np.testing.assert_array_equal(
    made.train.read(np.arange(100))["inputs"], before
  )


def test_noise_alone_gives_answers_that_can_be_trained_with():
  """However large it is: nothing is NaN, infinite, or out of bounds."""
  asked = sources.private_statistics(_made().train)
  train = _made().train
  rng = np.random.default_rng(0)
  for scale in (0, 1e9, 1e30):
    for _ in range(5):
      noisy = [int(x * scale) for x in rng.normal(size=asked.width)]
      answers = asked.answers(noisy, num_units=540, stddev=max(scale, 1.0))
      assert 0 <= answers["age"]["mean"] <= 120
      assert 0 < answers["age"]["deviation"] <= 60
      assert answers["pay"]["lower"] < answers["pay"]["upper"]
      inputs = train.with_statistics(answers).read(np.arange(50))["inputs"]
      assert np.isfinite(inputs).all()


def test_what_is_asked_has_a_digest_and_an_encoding_of_its_own():
  first = _made()
  changed = [
    {"age": data.Standardized(0, 121)},
    {"age": data.Quantiles(0, 120)},
    {"pay": data.Quantiles(0, 1e5, keep=(0.1, 0.8), bins=100)},
    {"pay": data.Quantiles(0, 1e5, keep=(0.1, 0.9), bins=99)},
    {"job": data.Counts(at_least=21)},
  ]
  asked = [_OPTIONS["private_statistics"] | change for change in changed]
  others = [_made(private_statistics=each) for each in asked]
  others.append(_made(categories={"job": ["cook", "nurse", "judge", "pilot"]}))
  others.append(_made(missing=3))
  others += [_made(categories={"job": [x]}) for x in (0.1, np.float32(0.1))]
  # What is compared as a number is found in other cells.
  for listed in ([1, 2], ["1", "2"]):
    changes = {"job": listed}
    others.append(_made(categories=changes))
  digests = {
    sources.private_statistics(each.train).digest() for each in (first, *others)
  }
  assert len(digests) == len(others) + 1
  encodings = {sources.encoding_digest(x.train) for x in (first, *others)}
  assert len(encodings) == len(others) + 1
  # The data is the same.
  assert len({x.train.content_digest() for x in (first, *others)}) == 1
  assert sources.private_statistics(_made(private_statistics={}).train) is None


def test_declared_values_are_compared_as_what_they_are_in_the_digest():
  """A list that was looked up before, and is equal, says nothing of another."""
  column = {"c": ["1", "1.0", "a"]}
  found = [
    data.from_arrays(
      column, test=column, inputs="c", categories={"c": declared}
    ).train.read(np.arange(3))["inputs"]
    for declared in ([1.0, "a"], [1, "a"])
  ]
  assert not np.array_equal(*found)


def test_a_value_that_is_of_no_kind_counts_as_no_declared_one():
  """And ends in no error, which would tell of the row, and of nothing else."""
  values = np.empty(3, object)
  values[:] = [[1, 2], b"\xff", 10**400]
  assert encoding._places(values, [1, 2]).tolist() == [-1, -1, -1]
  assert encoding._places(values, ["1", "2"]).tolist() == [-1, -1, -1]


def test_users_have_a_vector_each():
  made = _made(users="who").over_users(3, name="who")
  assert isinstance(made.train, users_lib.UserSource)
  asked = sources.private_statistics(made.train)
  examples = made.train.examples
  sums = asked.sums(
    examples.measured, len(examples), made.train.unit_of_example
  )
  answers = asked.answers(sums, num_units=len(made.train), stddev=1.0)
  assert sum(answers["ill"]["counts"]) == pytest.approx(len(made.train))
  changed = sources.with_statistics(made.train, answers)
  assert changed.read(np.arange(2))["inputs"].shape == (2, 3, 6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"private_statistics": {"age": (0, 120)}},
      r"private_statistics\['age'\] must be a dpdist.data.Standardized, Quant",
    ),
    (
      {"public_statistics": {"age": (1, 2)}},
      r"private_statistics\['age'\] must not be given where public_statistics",
    ),
    (
      {"private_statistics": {"who": data.Standardized(0, 1)}},
      "private_statistics must be of columns that are inputs or targets",
    ),
  ],
)
def test_bad_options_are_named(options, message):
  with pytest.raises(errors.ArgumentError, match=message):
    _made(**options)


@pytest.mark.parametrize(
  ("query", "message"),
  [
    ({"age": data.Counts()}, "must be of a column with categories"),
    ({"job": data.Standardized(0, 1)}, "must be of a column of numbers"),
    ({"ill": data.Quantiles(0, 1)}, "must be of a column of numbers"),
  ],
)
def test_queries_that_do_not_fit_their_column_are_named(query, message):
  made = _made(private_statistics=query)
  with pytest.raises(errors.ArgumentError, match=message):
    sources.private_statistics(made.train)


class _Own(queries.Counts):
  """A query of the caller's, whose code could say anything of a row."""


def test_a_query_of_the_callers_own_class_is_refused():
  asked = _OPTIONS["private_statistics"] | {"job": _Own()}
  with pytest.raises(errors.ArgumentError, match=r"must be a dpdist\.data"):
    _made(private_statistics=asked)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: data.Standardized(1, 1), "high must be more than low=1.*got 1"),
    (lambda: data.Standardized(0, math.inf), "high must be finite"),
    (lambda: data.Standardized(math.nan, 1), "low must be finite"),
    (lambda: data.Quantiles(0, 1, keep=(0.9, 0.1)), "keep must be two rising"),
    (lambda: data.Quantiles(0, 1, keep=3), "keep must be two rising"),
    (lambda: data.Quantiles(0, 1, bins=1), "bins must be an integer"),
    (lambda: data.Counts(at_least=-1), "at_least must be"),
  ],
)
def test_bad_queries_are_named(make, message):
  with pytest.raises(errors.ArgumentError, match=message):
    make()

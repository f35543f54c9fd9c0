"""Arguments are checked in one way, and messages name argument, rule, value."""

import dataclasses
import math

import numpy as np
import pytest

from dpdist import _validation
from dpdist import errors


@pytest.mark.parametrize(
  ("rule", "right", "plain"),
  [
    (_validation.COUNT, np.int32(3), int),
    (_validation.integer(0, 5), 5, int),
    (_validation.POSITIVE, 1, float),
    (_validation.POSITIVE, np.float32(0.5), float),
    (_validation.PROBABILITY, 1, float),
    (_validation.real(at_least=0), 0, float),
    (_validation.one_of(("a", "b")), "a", str),
    (_validation.FLAG, False, bool),
    (_validation.optional(_validation.COUNT), np.int64(2), int),
    (_validation.optional(_validation.COUNT), None, type(None)),
  ],
)
def test_a_right_value_becomes_a_plain_one(rule, right, plain):
  value = _validation.check("x", right, rule)
  assert value == right
  assert type(value) is plain


@pytest.mark.parametrize(
  ("rule", "wrong", "text"),
  [
    (_validation.COUNT, 0, "x must be an integer >= 1, got 0"),
    (_validation.COUNT, True, "x must be an integer >= 1, got True"),
    (_validation.COUNT, 1.0, "x must be an integer >= 1, got 1.0"),
    (
      _validation.COUNT,
      10**400,
      "x must be an integer >= 1, and below 2**63, got 1",
    ),
    (_validation.integer(0, 5), 6, "x must be an integer in [0, 5], got 6"),
    (_validation.POSITIVE, 0, "x must be finite and > 0, got 0"),
    (_validation.POSITIVE, math.inf, "x must be finite and > 0, got inf"),
    (_validation.POSITIVE, math.nan, "x must be finite and > 0, got nan"),
    (
      _validation.POSITIVE,
      10**400,
      "x must be finite and > 0, and below 2**63, got 1",
    ),
    (_validation.POSITIVE, "1", "x must be finite and > 0, got '1'"),
    (_validation.real(at_least=0), -1, "x must be finite and >= 0, got -1"),
    (_validation.DELTA, 1, "x must be in (0, 1), got 1"),
    (_validation.DELTA, 0.0, "x must be in (0, 1), got 0.0"),
    (_validation.DELTA, math.nan, "x must be in (0, 1), got nan"),
    (_validation.PROBABILITY, 1.5, "x must be in (0, 1], got 1.5"),
    (_validation.real(at_least=1, below=2), 2, "x must be in [1, 2), got 2"),
    (_validation.one_of(("a", "b")), "c", "x must be one of ('a', 'b'), got"),
    (_validation.one_of(("a", "b")), None, "x must be one of ('a', 'b'), got"),
    (_validation.FLAG, 1, "x must be True or False, got 1"),
    (
      _validation.optional(_validation.COUNT),
      0,
      "x must be None or an integer",
    ),
    (_validation.optional(_validation.COUNT), True, "x must be None or an int"),
    (_validation.optional(_validation.COUNT), "1", "x must be None or an int"),
  ],
)
def test_a_wrong_value_is_named_with_its_rule(rule, wrong, text):
  with pytest.raises(errors.ArgumentError) as error:
    _validation.check("x", wrong, rule)
  assert str(error.value).startswith(text)


@dataclasses.dataclass(frozen=True)
class _Record:
  size: int
  limit: int | None = None
  free: object = None

  def __post_init__(self):
    rule = _validation.COUNT
    _validation.check_fields(self, {"size": rule, "limit": rule})


def test_fields_are_held_to_a_table():
  assert type(_Record(np.int64(2)).size) is int
  assert _Record(1, None, "anything").limit is None
  with pytest.raises(ValueError, match=r"^limit .* >= 1, got 0"):
    _Record(1, 0)
  with pytest.raises(ValueError, match=r"^size .* >= 1, got None"):
    _Record(None)

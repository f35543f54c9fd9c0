"""Adult's records, as they become inputs."""

import numpy as np
import pytest

from dpdist.data.datasets import adult

_RECORDS = (
  "|1x3 Cross validator\n"
  "50, Private, 1, Bachelors, 8, Divorced, Sales, Wife, Black, Female, 0, 0,"
  " 40, Cuba, <=50K.\n"
  "200, ?, 1, HS-grad, 16, Divorced, ?, Wife, White, Male, 99999, 0, 5,"
  " ?, >50K\n"
  "\n"
)


def _read(path, text):
  path.write_text(text)
  source = adult.load(path)
  return source.read(np.arange(len(source)))


def test_a_record_becomes_numbers_steps_and_categories(tmp_path):
  batch = _read(tmp_path / "adult.test", _RECORDS)
  np.testing.assert_array_equal(batch["targets"], [0, 1])
  assert batch["targets"].dtype == np.int32
  inputs = batch["inputs"]
  assert inputs.shape == (2, 125)
  assert inputs.dtype == np.float32
  assert inputs.min() == 0
  assert inputs.max() == 1  # An age of 200 counts as 100.
  np.testing.assert_allclose(inputs[0, :6], [1, 0.5, 0.5, 0, 0, 0.4])
  np.testing.assert_allclose(inputs[1, :6], [1, 1, 1, 1, 0, 0.05], atol=1e-5)
  # Ages from 20 by fives; hours.
  np.testing.assert_array_equal(inputs[0, 6:18], [1] * 7 + [0] * 5)
  np.testing.assert_array_equal(inputs[0, 18:26], [1] * 5 + [0] * 3)
  # One category of each column; none where it is unknown.
  np.testing.assert_array_equal(inputs[:, 26:].sum(1), [8, 5])
  assert inputs[0, 26] == 1  # Private comes first of the first.


def test_no_record_has_a_share_in_another(tmp_path):
  both = _read(tmp_path / "both", _RECORDS)["inputs"]
  first, second, third, *_ = _RECORDS.split("\n")
  for i, line in enumerate((second, third)):
    alone = _read(tmp_path / f"{i}", f"{first}\n{line}\n")["inputs"]
    np.testing.assert_array_equal(alone[0], both[i])


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    (", Cuba", "", "records of 15 columns"),
    ("50, P", "fifty, P", "numbers in columns .0, 4"),
    (">50K", "50K", "labels .'<=50K', '>50K'"),
    (_RECORDS, "", "records of 15 columns"),
  ],
)
def test_another_file_is_refused_without_a_word_of_it(
  tmp_path, old, new, message
):
  with pytest.raises(ValueError, match=message) as error:
    _read(tmp_path / "adult.data", _RECORDS.replace(old, new))
  assert "fifty" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match="none must be a file of Adult"):
    adult.load(tmp_path / "none")

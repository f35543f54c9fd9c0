"""The Adult data set: does a person earn more than 50,000 dollars a year?

Records of 48,842 people from the census of the United States of 1994 (Kohavi
1996, "Scaling Up the Accuracy of Naive-Bayes Classifiers"). A person is one
record, and the unit of privacy.

Each record is processed by itself: categories are those that the data set's own
description lists, and numbers are scaled by constants that were chosen without
the data. The survey's weight of a record (fnlwgt), which depends on other
records, is left out.
"""

import csv

import numpy as np

from dpdist.data import arrays as arrays_lib
from dpdist.data import sources

# By column, its categories in the order of the description (adult.names).
_CATEGORIES = {
  1: "Private, Self-emp-not-inc, Self-emp-inc, Federal-gov, Local-gov,"
  " State-gov, Without-pay, Never-worked",
  3: "Bachelors, Some-college, 11th, HS-grad, Prof-school, Assoc-acdm,"
  " Assoc-voc, 9th, 7th-8th, 12th, Masters, 1st-4th, 10th, Doctorate, 5th-6th,"
  " Preschool",
  5: "Married-civ-spouse, Divorced, Never-married, Separated, Widowed,"
  " Married-spouse-absent, Married-AF-spouse",
  6: "Tech-support, Craft-repair, Other-service, Sales, Exec-managerial,"
  " Prof-specialty, Handlers-cleaners, Machine-op-inspct, Adm-clerical,"
  " Farming-fishing, Transport-moving, Priv-house-serv, Protective-serv,"
  " Armed-Forces",
  7: "Wife, Own-child, Husband, Not-in-family, Other-relative, Unmarried",
  8: "White, Asian-Pac-Islander, Amer-Indian-Eskimo, Other, Black",
  9: "Female, Male",
  13: "United-States, Cambodia, England, Puerto-Rico, Canada, Germany,"
  " Outlying-US(Guam-USVI-etc), India, Japan, Greece, South, China, Cuba, Iran,"
  " Honduras, Philippines, Italy, Poland, Jamaica, Vietnam, Mexico, Portugal,"
  " Ireland, France, Dominican-Republic, Laos, Ecuador, Taiwan, Haiti,"
  " Columbia, Hungary, Guatemala, Nicaragua, Scotland, Thailand, Yugoslavia,"
  " El-Salvador, Trinadad&Tobago, Peru, Hong, Holand-Netherlands",
}
# By column, the number that becomes 1, and whether to take logarithms: of
# dollars, whose values end at 99,999.
_NUMBERS = {
  0: (100, False),  # age
  4: (16, False),  # years of education, as a code
  10: (100_000, True),  # capital gain
  11: (100_000, True),  # capital loss
  12: (100, False),  # hours a week
}
_AGES = np.arange(20, 80, 5)
_HOURS = np.array([10, 20, 30, 35, 40, 45, 50, 60])
_NUM_COLUMNS = 15
_LABELS = {"<=50K": 0, ">50K": 1}


def load(path: sources.Path) -> arrays_lib.ArraySource:
  """Reads adult.data or adult.test.

  Examples are {"inputs": float32 (125,) in [0, 1], "targets": int32 ()}, 1 for
  more than 50,000 dollars. Inputs are a 1, the numbers, steps of age and of
  hours, and a 1 for each category that holds; an unknown category has no 1.
  """
  try:
    with open(path, newline="") as file:
      rows = [
        row
        for row in csv.reader(file, skipinitialspace=True)
        # adult.test begins with a remark, and both end with an empty line.
        if row and not row[0].startswith("|")
      ]
  except OSError as error:
    raise ValueError(f"{path} must be a file of Adult: {error}") from error
  # No row in the message: it is a person's record.
  if not rows or any(len(row) != _NUM_COLUMNS for row in rows):
    raise ValueError(f"{path} must hold records of {_NUM_COLUMNS} columns")
  columns = list(zip(*rows, strict=True))
  parts = [np.ones((len(rows), 1))]
  try:
    for column, (largest, takes_log) in _NUMBERS.items():
      number = np.array(columns[column], np.float64)
      if takes_log:
        number, largest = np.log1p(number), np.log1p(largest)
      # Inside [0, 1] whatever the file holds.
      parts.append(np.clip(number / largest, 0, 1)[:, None])
    for column, steps in ((0, _AGES), (12, _HOURS)):
      number = np.array(columns[column], np.float64)
      parts.append((number[:, None] >= steps).astype(float))
    targets = [_LABELS[label.rstrip(".")] for label in columns[-1]]
  except (ValueError, KeyError):
    raise ValueError(
      f"{path} must hold numbers in columns {sorted(_NUMBERS)} and labels"
      f" {sorted(_LABELS)}"
    ) from None
  for column, text in _CATEGORIES.items():
    names = np.array(text.split(", "))
    parts.append((np.array(columns[column])[:, None] == names).astype(float))
  return arrays_lib.ArraySource(
    {
      "inputs": np.concatenate(parts, axis=1).astype(np.float32),
      "targets": np.array(targets, np.int32),
    }
  )

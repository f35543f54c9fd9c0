"""How many groups a group norm has that stands for a batch norm."""

_MOST_GROUPS, _FEWEST_FEATURES = 32, 4


def num_groups(features: int) -> int:
  """Returns the most groups, at most 32, of equally many features.

  A group has four features or more, since a group of one feature of a vector
  has no variance: its norm would be 0, whatever the example is.
  """
  most = max(1, min(_MOST_GROUPS, features // _FEWEST_FEATURES))
  return next(n for n in range(most, 0, -1) if features % n == 0)


def sentence(where: str, groups: str) -> str:
  """Returns what was done to a batch norm."""
  return (
    f"{where}: BatchNorm was replaced by GroupNorm"
    + (f" of {groups} groups" if groups else "")
    + ", which normalises each example by itself"
  )

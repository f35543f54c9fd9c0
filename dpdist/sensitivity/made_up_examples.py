"""Makes up examples that are hard for a norm: of all sizes, and that cancel.

They are public random numbers with an example's dtypes and shapes, and contain
nothing of the data.
"""

from collections.abc import Iterator, Sequence
import math
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any

# Powers of ten. The squares of tiny numbers are 0, those of huge ones nearly
# infinite. Least and most are near the ends of the dtype's range. First and
# last are so near that they leave no room for any factor.
_POWERS = {
  16: {"tiny": -4.0, "huge": 3.0, "least": -4.5, "most": 4.0, "large": 2.0}
  | {"first": -4.2, "last": 4.5},
  32: {"tiny": -19.5, "huge": 18.0, "least": -37.3, "most": 36.5, "large": 8.0}
  | {"first": -37.9, "last": 37.9},
  64: {"tiny": -155.0, "huge": 153.0, "least": -307.0, "most": 306.0}
  | {"large": 8.0, "first": -307.6, "last": 307.6},
}
# Kinds of floats, with two sizes: that of an example's first, third, ...
# floating array, and that of the others.
_PAIRS = (
  ("normal", ("one", "one")),
  ("normal", ("small", "small")),
  ("normal", ("big", "big")),
  ("constant", ("one", "one")),
  ("constant", ("one", "large")),
  ("constant", ("large", "one")),
  ("mirrored", ("one", "one")),
  ("mirrored", ("one", "large")),
  ("mirrored", ("large", "one")),
  ("normal", ("tiny", "huge")),
  ("normal", ("huge", "tiny")),
  ("mirrored", ("tiny", "huge")),
  ("mirrored", ("tiny", "huge")),
  ("mirrored", ("tiny", "huge")),
  ("mirrored", ("huge", "tiny")),
  ("constant", ("tiny", "huge")),
  ("constant", ("least", "huge")),
  ("normal", ("least", "most")),
  ("normal", ("most", "least")),
  ("mirrored", ("least", "most")),
  ("mirrored", ("most", "least")),
  ("constant", ("one", "huge")),
  ("pair", ("first", "last")),
  ("pair", ("last", "first")),
)
_ALONE = (
  ("normal", ("one", "one")),
  ("normal", ("small", "small")),
  ("normal", ("big", "big")),
  ("constant", ("one", "one")),
  ("constant", ("large", "large")),
  ("mirrored", ("one", "one")),
  ("normal", ("tiny", "tiny")),
  ("normal", ("huge", "huge")),
  ("normal", ("least", "least")),
  ("normal", ("most", "most")),
  ("pair", ("first", "first")),
  ("pair", ("last", "last")),
)
_WHOLE_NUMBERS = (
  ("normal", ("one", "one")),
  ("normal", ("one", "one")),
  ("normal", ("one", "one")),
)
_ORDINARY = {"one": 0.0, "small": -2.0, "big": 2.0}
_IDS = ("random", "random", "largest", "zero")


class Case(NamedTuple):
  """One made-up example."""

  name: str  # Describes its numbers.
  example: PyTree  # Of NumPy arrays, without the batch axis.
  is_ordinary: bool  # Whether none of its numbers has an extreme size.


def cases(shapes: PyTree, largest: PyTree) -> Iterator[Case]:
  """Yields made-up examples like one example, with integers up to `largest`."""
  leaves, structure = jax.tree.flatten(shapes)
  most = jax.tree.leaves(largest)
  num_floats = sum(map(_is_float, leaves))
  kinds = (_WHOLE_NUMBERS, _ALONE)[num_floats] if num_floats < 2 else _PAIRS
  for number, (kind, sizes) in enumerate(kinds):
    rng = np.random.Generator(np.random.Philox(key=number))
    ids = _IDS[number % len(_IDS)]
    filled, place = [], 0
    for leaf, end in zip(leaves, most, strict=True):
      if _is_float(leaf):
        size = sizes[place % 2]
        filled.append(_floats(rng, leaf, kind, size, is_odd=bool(place % 2)))
        place += 1
      else:
        filled.append(_integers(rng, leaf, ids, end))
    if kind == "mirrored":
      filled = _shuffled(rng, filled, leaves)
    what = " and ".join(dict.fromkeys(sizes[: max(1, min(2, num_floats))]))
    yield Case(
      f"{kind} floats of size {what!r}, {ids} integers"
      if num_floats
      else f"{ids} integers",
      jax.tree.unflatten(structure, filled),
      all(size in _ORDINARY for size in sizes),
    )


def padding(shapes: PyTree) -> PyTree:
  """Returns a padding example, with values such as NaN that data lacks."""

  def fill(leaf: Any) -> np.ndarray:
    if _is_float(leaf):
      return np.full(leaf.shape, np.nan, leaf.dtype)
    if leaf.dtype == np.bool_:
      return np.ones(leaf.shape, np.bool_)
    return np.full(leaf.shape, np.iinfo(leaf.dtype).max, leaf.dtype)

  return jax.tree.map(fill, shapes)


def _is_float(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, np.floating)


def _floats(
  rng: np.random.Generator, leaf: Any, kind: str, size: str, *, is_odd: bool
) -> np.ndarray:
  info = jax.numpy.finfo(leaf.dtype)
  # A bfloat16 has the range of a float32.
  bits = 16 if info.bits == 16 and float(info.max) < 1e6 else max(32, info.bits)
  power = (_ORDINARY | _POWERS[bits])[size]
  x = rng.normal(size=leaf.shape)
  if kind == "constant" and not is_odd:
    x = np.ones(leaf.shape)
  if kind == "pair":
    # Only two entries, which cancel or nearly do: no others hide them.
    x = np.zeros(leaf.shape)
    rows = leaf.shape[0] if leaf.shape else 1
    x.reshape(rows, math.prod(leaf.shape[1:]))[:2, :1] = 1
    if is_odd and leaf.shape:
      x[1:] *= -1
  if kind == "mirrored" and leaf.shape:
    half = leaf.shape[0] // 2
    x[half : 2 * half] = -x[:half] if is_odd else x[:half]
  end = 0.5 * float(info.max)
  return np.clip(x * 10.0**power, -end, end).astype(leaf.dtype)


def _shuffled(
  rng: np.random.Generator, filled: list[np.ndarray], leaves: Sequence[Any]
) -> list[np.ndarray]:
  """Shuffles rows, alike for all arrays with the same number of rows."""
  orders: dict[int, np.ndarray] = {}
  shuffled = []
  for x, leaf in zip(filled, leaves, strict=True):
    if leaf.shape:
      rows = leaf.shape[0]
      if rows not in orders:
        orders[rows] = rng.permutation(rows)
      x = x[orders[rows]]
    shuffled.append(x)
  return shuffled


def _integers(
  rng: np.random.Generator, leaf: Any, ids: str, largest: int
) -> np.ndarray:
  if leaf.dtype == np.bool_:
    return np.zeros(leaf.shape, np.bool_)
  end = max(0, min(int(largest), int(np.iinfo(leaf.dtype).max)))
  if ids == "largest":
    return np.full(leaf.shape, end, leaf.dtype)
  if ids == "zero":
    return np.zeros(leaf.shape, leaf.dtype)
  return rng.integers(0, end, leaf.shape, endpoint=True).astype(leaf.dtype)

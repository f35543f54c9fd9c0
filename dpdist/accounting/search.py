"""Finds the setting that spends a budget, in few queries.

Epsilon is slow to compute and has no inverse in closed form, so a calibration
searches over integers: numbers of steps, batch sizes, or the index of a noise
multiplier among those of six significant digits. The result is the last integer
that fits. Both it and the next one were queried, so it depends on no tolerance.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
import math

# Less noise than this counts as none: 1 / sigma^2 is about to overflow.
NO_NOISE = 1e-100
MOST_NOISE = 1e15
# The longest step from one query to the next, on a log scale.
_STRIDE = math.log(4)


@dataclasses.dataclass(frozen=True)
class Grid:
  """Consecutive integers, each with its place on a log scale."""

  lowest: int  # The first integer.
  highest: int  # The last integer.
  start: int = 1  # The integer to query first.
  # Maps an integer to its place on the log scale; it is increasing.
  log: Callable[[int], float] = math.log
  # Maps a place to about the largest integer whose `log` is not above.
  floor: Callable[[float], int] = lambda x: math.floor(math.exp(x))


def six_digits(index: int) -> float:
  """Returns the index-th number of six significant digits; 0 gives 1.0."""
  decade, mantissa = divmod(index, 900_000)
  return float(f"{100_000 + mantissa}e{decade - 5}")


def six_digits_index(log: float) -> int:
  """Returns the index of the first such number with at least this logarithm."""
  decade = math.floor(log / math.log(10))
  mantissa = math.ceil(math.exp(log - decade * math.log(10)) * 100_000)
  return 900_000 * decade + mantissa - 100_000


# Less noise spends more, so the integers count downwards.
NOISE_MULTIPLIERS = Grid(
  lowest=-six_digits_index(math.log(MOST_NOISE)),
  highest=-six_digits_index(math.log(NO_NOISE)),
  start=0,
  log=lambda n: -math.log(six_digits(-n)),
  floor=lambda x: -six_digits_index(-x),
)


def calibrate(
  grid: Grid,
  spent: Callable[[int, str], float],
  target: float,
  accountants: Sequence[str],
  *,
  slope: float,
) -> int | None:
  """Returns the largest integer whose epsilon is at most the target, if any.

  `spent` maps an integer and an accountant to epsilon. Accountants go from the
  quickest to the one that decides, and each gives at most the epsilon of the
  one before: where that one ended fits too, and the next search begins there.
  `slope` guesses that of log epsilon over the grid's logarithm.
  """
  start, best = grid.start, None
  for name in accountants:
    best = _largest(
      grid, functools.partial(_at, spent, name), target, start, slope
    )
    if best == grid.highest:
      return best
    start = grid.lowest if best is None else best
  return best


def _at(spent: Callable[[int, str], float], accountant: str, n: int) -> float:
  return spent(n, accountant)


def _largest(
  grid: Grid,
  spent: Callable[[int], float],
  target: float,
  start: int,
  slope: float,
) -> int | None:
  """Returns the largest integer that does not overspend, None if none does.

  `spent` must not fall. A query of it may take a second, so this follows
  secants of log epsilon, and bisects only if they gain nothing. Both the
  integer returned and the next one were queried.
  """
  low, high = grid.lowest - 1, grid.highest + 1  # Fits; overspends.
  probe, previous = start, None
  for query in itertools.count(1):
    value = spent(probe)
    if value <= target:
      low = probe
    else:
      high = probe
    if high - low <= 1:
      break
    x, y = grid.log(probe), _log(value / target)
    if previous is not None:
      rise = (y - previous[1]) / (x - previous[0])
      slope = rise if rise > 0 else slope
    previous = x, y
    # Queries far away are slow, hence short steps.
    move = min(max(-y / slope, -_STRIDE), _STRIDE)
    guess = grid.floor(x + move)
    if query > 12:  # Secants do not converge on this curve.
      if grid.lowest <= low and high <= grid.highest:
        guess = (low + high) // 2
      else:
        guess = grid.floor(x - math.copysign(_STRIDE, y))
    probe = min(max(guess, low + 1), high - 1)
  return low if low >= grid.lowest else None


def _log(ratio: float) -> float:
  """Returns a logarithm that stays finite where epsilon is 0 or infinite."""
  return math.log(min(max(ratio, 1e-9), 1e9))

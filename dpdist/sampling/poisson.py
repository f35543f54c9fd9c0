"""Draws the examples of a step by Poisson sampling.

Every example is drawn at every step with the same probability, independently
of all the others and of all other steps. This is the sampling that the
amplified epsilons of DP-SGD are proved for (Abadi et al., "Deep Learning with
Differential Privacy", CCS 2016; Mironov, Talwar and Zhang, "Renyi Differential
Privacy of the Sampled Gaussian Mechanism", arXiv:1908.10530). Shuffled or
fixed-size batches are other mechanisms, with other epsilons.

A draw depends on integers alone. Raw words come from the counter-based
generator Philox-4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1,
2, 3", SC 2011), which NumPy promises never to change. They are compared with
tables that are computed in Python integers. No float is ever rounded, so no
libm, no CPU and no new version of NumPy can change a draw.
"""

import bisect
from collections.abc import Callable, Sequence
import math

import numpy as np

from dpdist import registry
from dpdist.sampling import philox
from dpdist.sampling import sampler

# Below this probability the cost is per drawn example (`_sparse`). From it on
# the cost is per example (`_dense`), which is as fast and needs no rejection.
_DENSE_FROM = 1 / 8

# The purpose that words are drawn for, a part of every counter.
_INCLUSION, _COUNT_HIGH, _COUNT_LOW, _POSITION, SUBSET = range(5)

_WORD_BITS = 64
_TABLE_BITS = 2 * _WORD_BITS
# 128 guard bits: the squarings of (1 - q)^(2^b) lose about b <= 62 of them.
_FIXED_POINT_BITS = 2 * _TABLE_BITS

# Words that `_dense` compares at a time: 512 KiB, which fit in a core's cache.
_DENSE_RUN = 1 << 16


class PoissonSampler(sampler.Steps):
  """Draws each of `num_examples` examples with `sampling_probability`.

      sampler = PoissonSampler(
        num_examples=60_000, sampling_probability=256 / 60_000, seed=secret)
      indices = sampler(step)

  The draw is a pure function of (num_examples, sampling_probability, seed,
  step). So every host computes the same draw, in any order of steps, and there
  is no state to save. It takes time and memory in proportion to the number of
  examples drawn, not to `num_examples`. Many threads may share a sampler.

  The indices are private: the epsilon of a run holds only while nobody learns
  which examples were drawn. So the indices, their number and the seed must not
  leave the run.

  Guarantees:
    Given uniform words, the inclusions of the examples of one step are
    independent and have exactly the given float64 probability.
    * From probability 1/8 on, example i is drawn if a uniform 64-bit word of
      its own is below 2^64 q, which is an integer. This is exact.
    * Below 1/8, each block of m = 2^b consecutive examples gets a count k from
      Binomial(m, q), then a uniform subset of k of its positions, which is the
      joint law of m independent inclusions. The subset is exactly uniform: k
      uniform b-bit words, all drawn anew while two of them are equal. The count
      is drawn by inverting a cumulative distribution that is rounded down to
      128 bits and cut where at most 2^-128 of it is left. The distribution has
      fewer than 100 entries, each wrong by less than 2^-127, so the law of a
      block is within a total variation distance of 2^-120 of the ideal one. A
      million steps of a million blocks stay within 2^-80.
    Philox takes the place of the uniform words. No statistical test is known to
    tell them apart, but Philox is not a cryptographic generator: this is one
    more reason why the indices must not leave the run.

  Counters: the 256-bit counter of Philox is four 64-bit words: the running
  number of the group of four output words, the attempt at rejection, the
  purpose of the words (0: inclusions from 1/8 on; 1 and 2: high and low halves
  of the counts; 3: positions; 4: subsets, for other samplers), and the step.
  Streams overlap only after 2^66 words. The 128-bit key is made from the seed.

  Attributes:
    num_examples: The number of examples that are drawn from.
    sampling_probability: The probability of each.
  """

  def __init__(
    self,
    *,
    num_examples: int,
    sampling_probability: float,
    seed: int | bytes,
  ):
    """Checks the arguments and computes the tables.

    Args:
      num_examples: The number of examples, in [1, 2^62].
      sampling_probability: The probability q of each example, in (0, 1]. Its
        float64 value is used exactly.
      seed: An int of any sign and size, or bytes that are not empty. An int and
        bytes never mean the same seed. It must be secret, with 128 bits of
        entropy or more, for the privacy guarantee of a run to hold.

    Raises:
      ValueError: An argument is not as described.
    """
    self.num_examples = philox.check_int(
      "num_examples", num_examples, 1, 1 << 62
    )
    self.sampling_probability = _check_probability(sampling_probability)
    self._key = philox.philox_key(seed)
    if self.sampling_probability < _DENSE_FROM:
      self._block_bits = _block_bits(
        self.num_examples, self.sampling_probability
      )
      self._count_table = _binomial_table(
        self._block_bits, self.sampling_probability
      )

  def __call__(self, step: int) -> np.ndarray:
    """Draws the examples of a step.

    Args:
      step: The step, an int in [0, 2^63).

    Returns:
      int64[number drawn], indices in [0, num_examples), strictly increasing.
      It can be empty, and such a step counts like any other. Private.

    Raises:
      ValueError: `step` is not as described.
    """
    step = philox.check_int("step", step, 0, (1 << 63) - 1)
    if self.sampling_probability == 1:
      return np.arange(self.num_examples, dtype=np.int64)
    if self.sampling_probability >= _DENSE_FROM:
      return self._dense(step)
    return self._sparse(step)

  def _dense(self, step: int) -> np.ndarray:
    # q >= 2^-3 has no bit below 2^-56, so this product is an integer.
    threshold = np.uint64(int(math.ldexp(self.sampling_probability, 64)))
    stream = self._stream(step, _INCLUSION)
    drawn = []
    for start in range(0, self.num_examples, _DENSE_RUN):
      words = stream.random_raw(min(_DENSE_RUN, self.num_examples - start))
      drawn.append(np.flatnonzero(words < threshold) + start)
    return np.concatenate(drawn).astype(np.int64, copy=False)

  def _sparse(self, step: int) -> np.ndarray:
    bits = self._block_bits
    num_blocks = -(-self.num_examples >> bits)

    def low_word(block: int) -> int:
      group, place = divmod(block, 4)
      return int(self._stream(step, _COUNT_LOW, group).random_raw(4)[place])

    high_words = self._stream(step, _COUNT_HIGH).random_raw(num_blocks)
    counts = _invert(self._count_table, high_words, low_word)
    # Each block has as many consecutive slots in `indices` as its count.
    firsts = np.repeat(np.arange(num_blocks, dtype=np.int64) << bits, counts)
    indices = firsts
    slots = np.arange(firsts.size)
    attempt = 0
    while slots.size:
      stream = self._stream(step, _POSITION, attempt=attempt)
      positions = stream.random_raw(slots.size) >> np.uint64(_WORD_BITS - bits)
      # "stable" is a merge sort, which is fast on nearly sorted input.
      drawn = np.sort(firsts[slots] | positions.view(np.int64), kind="stable")
      if attempt == 0:
        indices = drawn
      else:
        indices[slots] = drawn
      # Blocks in which two positions are equal are drawn anew as a whole:
      # replacing only the equal ones would not be uniform over subsets.
      collided = drawn[1:][drawn[1:] == drawn[:-1]] >> bits
      slots = slots[np.isin(drawn >> bits, collided)]
      attempt += 1
    # The last block may reach past the end. Inclusions are independent, so
    # dropping those beyond does not change the others.
    return indices[: np.searchsorted(indices, self.num_examples)]

  def _stream(
    self, step: int, purpose: int, group: int = 0, *, attempt: int = 0
  ) -> np.random.Philox:
    return philox.stream(self._key, step, purpose, group, attempt=attempt)


def _block_bits(num_examples: int, probability: float) -> int:
  """Returns b such that 2 to 4 of a block's 2^b examples are drawn."""
  # frexp: q = f * 2^e, 1/2 <= f < 1; so 2^(2-e) q is in [2, 4).
  _, exponent = math.frexp(probability)
  return max(1, min(2 - exponent, (num_examples - 1).bit_length()))


def _binomial_table(bits: int, probability: float) -> list[int]:
  """Returns the cumulative distribution of Binomial(2^bits, probability).

  bits is at most 62, and 2^bits probability below 4. Returns floor(2^128
  P(count <= k)) for k = 0, 1, ..., up to the last k with P(count > k) > 2^-128.
  """
  numerator, denominator = probability.as_integer_ratio()
  one = 1 << _FIXED_POINT_BITS
  term = one * (denominator - numerator) // denominator
  for _ in range(bits):
    term = term * term >> _FIXED_POINT_BITS
  table = []
  cumulative = term
  num_examples = 1 << bits
  for k in range(num_examples):
    if one - cumulative <= one >> _TABLE_BITS:
      break
    table.append(cumulative >> (_FIXED_POINT_BITS - _TABLE_BITS))
    # P(k + 1) / P(k) = (m - k) / (k + 1) * q / (1 - q)
    term = (
      term
      * ((num_examples - k) * numerator)
      // ((k + 1) * (denominator - numerator))
    )
    cumulative += term
  return table


def _invert(
  table: Sequence[int],
  high_words: np.ndarray,
  low_word: Callable[[int], int],
) -> np.ndarray:
  """Inverts a cumulative distribution at uniform numbers of 128 bits.

  The table has thresholds of 128 bits, in ascending order. low_word is called
  only where the high half of a number, of uint64[n], does not decide: about
  once in 2^60. Returns int64[n], how many thresholds are at most each number.
  """
  thresholds = np.array([t >> _WORD_BITS for t in table], dtype=np.uint64)
  counts = np.searchsorted(thresholds, high_words, side="right")
  # The greatest threshold whose high half is at most the word. Where there is
  # none, any value will do: an unneeded low word does not change the result.
  below = np.append(np.uint64(0), thresholds)[counts]
  for i in np.flatnonzero(below == high_words).tolist():
    number = (int(high_words[i]) << _WORD_BITS) | low_word(i)
    counts[i] = bisect.bisect_right(table, number)
  return counts.astype(np.int64, copy=False)


def _check_probability(value: float) -> float:
  is_number = isinstance(value, (int, float, np.integer, np.floating))
  # Written so that it refuses NaN, and wider floats that float64 rounds to 0.
  in_range = is_number and 0 < value <= 1 and 0 < float(value) <= 1
  if not in_range or isinstance(value, bool):
    raise ValueError(
      f"sampling_probability must be a number in (0, 1], got {value!r}"
    )
  return float(value)


@registry.register("sampling", "poisson")
class Poisson:
  """Draws every row, or group, by itself; see `sampler.Sampling`."""

  probability = staticmethod(sampler.mean_probability)

  def check(self, numbers: sampler.Numbers) -> None:
    """Raises nothing: it accepts all numbers of a plan."""

  def typical_rows(self, numbers: sampler.Numbers, batch_size: float) -> int:
    # Three deviations above the mean: about one step in a thousand has more.
    batch = batch_size / numbers.group_size
    size = math.ceil(batch + 3 * math.sqrt(batch))
    return min(size, sampler.num_units(numbers))

  def most_rows(
    self, numbers: sampler.Numbers, batch_size: float, tail: float
  ) -> int:
    """Uses Chernoff's bound: P(X >= k) <= exp(-n D(k/n || q))."""
    count = -(-sampler.num_units(numbers) // numbers.cycle_length)
    q = self.probability(numbers, batch_size)
    if q >= 1:
      return count
    low, high = min(count, math.ceil(count * q)), count
    while low < high:
      middle = (low + high) // 2
      if _exponent(middle + 1, count, q) > -math.log(tail):
        high = middle
      else:
        low = middle + 1
    return low

  def make(
    self,
    numbers: sampler.Numbers,
    batch_size: float,
    *,
    seed: bytes,
    first_release: int,
  ) -> sampler.Sampler:
    return PoissonSampler(
      num_examples=sampler.num_units(numbers),
      sampling_probability=self.probability(numbers, batch_size),
      seed=seed,
    )

  def summary(self, numbers: sampler.Numbers) -> str:
    return "Poisson"

  def describe(self, numbers: sampler.Numbers) -> str:
    what = numbers.unit
    if numbers.group_size > 1:
      what = f"group of {numbers.group_size} {numbers.unit}s"
    q = self.probability(numbers, numbers.expected_batch_size)
    return (
      f"At each step every {what} is drawn, apart from all others (Poisson"
      f" sampling), {sampler.in_words(numbers, q)}.{describe_groups(numbers)}"
    )


def describe_groups(numbers: sampler.Numbers) -> str:
  """Returns a sentence on what one row can do to its group; "" of none."""
  if numbers.group_size == 1:
    return ""
  # This is no more than once the sensitivity under "replace_one".
  far = (
    "."
    if numbers.neighboring_relation == "replace_one"
    else ": their sum moves by up to twice the clip norm."
  )
  return (
    " The gradients of a group are averaged and clipped as one, which one"
    f" {numbers.unit} can turn over{far}"
  )


def _exponent(k: int, n: int, q: float) -> float:
  """Returns n D(k/n || q) of Chernoff's bound, for k >= n q; inf for k > n."""
  if k > n:
    return math.inf
  p = k / n
  rest = 0.0 if k == n else (1 - p) * math.log((1 - p) / (1 - q))
  return n * (p * math.log(p / q) + rest)

"""Tests of dpdist.sampling.

The statistical tests have fixed seeds, so they give the same answer on every
run. A right sampler fails one of them with probability 1e-6 over the choice of
its seed; the samplers that they are there to catch fail with near certainty.
"""

import ast
import bisect
from concurrent import futures
import decimal
import fractions
import hashlib
import itertools
import math
import pathlib
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import stats

from dpdist import sampling
from dpdist.sampling import poisson

ERROR_RATE = 1e-6
WORD = 2**64 - 1


def make(num_examples, probability, seed=0):
  return sampling.PoissonSampler(
    num_examples=num_examples, sampling_probability=probability, seed=seed
  )


def chi_square(observed, expected, smallest=10):
  """Tests counts, those with a small expectation pooled, at ERROR_RATE."""
  observed, expected = np.ravel(observed), np.ravel(expected)
  assert math.isclose(observed.sum(), expected.sum(), rel_tol=1e-9)
  rare = expected < smallest
  if rare.any():
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
      assert observed[-1] == 0
      observed, expected = observed[:-1], expected[:-1]
  statistic = ((observed - expected) ** 2 / expected).sum()
  assert stats.chi2.sf(statistic, len(observed) - 1) > ERROR_RATE


def subset_law(size, probability):
  """The probability of each subset, by the bits of its number."""
  ones = np.array([number.bit_count() for number in range(2**size)])
  return probability**ones * (1 - probability) ** (size - ones)


# The stream: golden values, and an implementation from scratch.


def philox(counter, key):
  """Philox-4x64-10, from the paper, on lists of Python integers."""
  counter, key = list(counter), list(key)
  for _ in range(10):
    high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
    high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
    counter = [
      high1 ^ counter[1] ^ key[0],
      low1,
      high0 ^ counter[3] ^ key[1],
      low0,
    ]
    key[0] = (key[0] + 0x9E3779B97F4A7C15) & WORD
    key[1] = (key[1] + 0xBB67AE8584CAA73B) & WORD
  return counter


def words_of(key, step, purpose, attempt=0):
  # NumPy adds one to the counter before it uses it.
  for group in itertools.count(1):
    yield from philox([group, attempt, purpose, step], key)


def exact_binomial_table(num_examples, probability):
  """floor(2^128 P(count <= k)) for all k below num_examples, exactly."""
  drawn, out_of = fractions.Fraction(probability).as_integer_ratio()
  cumulative, table = 0, []
  for k in range(num_examples):
    subsets = math.comb(num_examples, k)
    cumulative += subsets * drawn**k * (out_of - drawn) ** (num_examples - k)
    table.append(cumulative * 2**128 // out_of**num_examples)
  return table


def reference(num_examples, probability, seed, step):
  """The documented draw, one word at a time."""
  if isinstance(seed, bytes):
    encoded = b"bytes:" + seed
  else:
    encoded = b"int:" + f"{seed:x}".encode()
  digest = hashlib.sha256(b"dpdist.sampling/philox_key/v1\0" + encoded).digest()
  key = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
  q = fractions.Fraction(probability)
  if q == 1:
    return list(range(num_examples))
  if q >= fractions.Fraction(1, 8):
    words = words_of(key, step, 0)
    return [i for i in range(num_examples) if next(words) < q * 2**64]
  bits = 1
  while 2 ** (bits + 1) * q < 4 and 2**bits < num_examples:
    bits += 1
  size = 2**bits
  table = exact_binomial_table(size, probability)
  highs, lows = words_of(key, step, 1), words_of(key, step, 2)
  todo = []
  for start in range(0, num_examples, size):
    number = next(highs) * 2**64 + next(lows)
    todo.append((start, bisect.bisect_right(table, number)))
  drawn = []
  for attempt in itertools.count():
    again = []
    positions = words_of(key, step, 3, attempt)
    for start, count in todo:
      block = {start + (next(positions) >> (64 - bits)) for _ in range(count)}
      if len(block) == count:
        drawn.extend(block)
      else:
        again.append((start, count))
    todo = again
    if not todo:
      return sorted(i for i in drawn if i < num_examples)
  raise AssertionError


def test_the_reference_philox_has_the_authors_known_answer():
  assert philox([0] * 4, [0] * 2) == [
    0x16554D9ECA36314C,
    0xDB20FE9D672D0FDC,
    0xD7E772CEE186176B,
    0x7E68B68AEC7BA23B,
  ]


@pytest.mark.parametrize("step", [0, 1, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize(
  ("num_examples", "probability", "seed"),
  [
    (1, 0.01, 0),
    (1, 0.5, 0),
    (2, 0.124, -1),
    (5, 0.12, b"seed"),
    (100, 0.12, 3),
    (1000, 0.1, 2**200),
    (1000, 0.03, b"seed"),
    (1024, 1 / 256, 4),
    (1025, 1 / 256, 4),
    (300, 0.125, 5),
    (300, 0.6, 6),
    (300, 1 - 2**-53, 7),
    (20, 1.0, 8),
  ],
)
def test_draws_equal_those_of_the_reference(
  num_examples, probability, seed, step
):
  drawn = make(num_examples, probability, seed)(step).tolist()
  assert drawn == reference(num_examples, probability, seed, step)


def test_short_draws_are_golden():
  assert make(60_000, 1e-4)(0).tolist() == [
    3972,
    39811,
    44092,
    45454,
    54646,
    59546,
  ]
  assert make(60_000, 1e-4)(1).tolist() == [
    12562,
    20502,
    45502,
    47459,
    50969,
    51952,
    53868,
    54462,
  ]
  assert make(60_000, 1e-4, seed=-1)(1).tolist() == [
    6233,
    6492,
    33589,
    35417,
    36197,
    37942,
  ]
  assert make(60_000, 1e-4, seed=b"seed")(1).tolist() == [
    11910,
    42821,
    43167,
    44972,
    49865,
    50209,
    55289,
  ]
  assert make(12, 0.4)(5).tolist() == [0, 3, 5, 6, 11]
  assert make(10**12, 4e-12)(7).tolist() == [
    74974086357,
    91477302382,
    435958454023,
    522829696378,
  ]


@pytest.mark.parametrize(
  ("num_examples", "probability", "seed", "step", "size", "digest"),
  [
    (60_000, 256 / 60_000, 0, 0, 250, "ac9ad3d83a0e54d446205a8544061264"),
    (
      60_000,
      256 / 60_000,
      b"\x05",
      2**63 - 1,
      238,
      "d73f97ac557e790bffa0cbb18462c07e",
    ),
    (
      60_000,
      256 / 60_000,
      5,
      2**63 - 1,
      283,
      "e6b12d69e6dbef031fff65c2e373c14c",
    ),
    (10**6, 1e-3, 2**128 + 1, 12, 1006, "332ca7f1001c8884d47f1b3ca7a8e3e2"),
    (10**7, 1e-2, b"seed", 3, 100084, "06c60f146834561b28dfefcbaf1d8f1b"),
    (10**9, 1e-6, -7, 2**40, 995, "8f8a7f23237d4a1d9e2aa5fb9e4482b6"),
    (2**62, 2.0**-53, 1, 1, 514, "fdba904cdf85b5a310a45cd9b754f45b"),
    (200_000, 0.3, 0, 9, 60093, "00d7be7313802a49eb1acf78e05442f0"),
    (200_000, 0.8, 0, 9, 160185, "8d4c37fd952d61d251171da4e557faef"),
  ],
)
def test_long_draws_are_golden(
  num_examples, probability, seed, step, size, digest
):
  drawn = make(num_examples, probability, seed)(step)
  assert len(drawn) == size
  data = drawn.astype("<i8").tobytes()
  assert hashlib.sha256(data).hexdigest()[:32] == digest


def test_a_draw_is_a_pure_function_of_seed_and_step():
  first, second = make(10**5, 0.01, b"seed"), make(10**5, 0.01, b"seed")
  steps = list(range(30))
  forward = {step: first(step).tobytes() for step in steps}
  assert {step: second(step).tobytes() for step in steps[::-1]} == forward
  assert {step: first(step).tobytes() for step in steps[::-1]} == forward
  assert first(np.int32(3)).tobytes() == forward[3]
  with futures.ThreadPoolExecutor(8) as pool:
    drawn = pool.map(lambda step: first(step).tobytes(), steps * 10)
    assert list(drawn) == [forward[step] for step in steps] * 10


def test_the_global_random_state_is_left_alone():
  before = np.random.get_state()[1].tobytes()
  make(1000, 0.05)(0)
  assert np.random.get_state()[1].tobytes() == before


def test_only_the_raw_words_of_philox_are_used():
  folder = pathlib.Path(poisson.__file__).parent
  modules = sorted(folder.glob("*.py"))
  tree = ast.parse("\n".join(module.read_text() for module in modules))
  uses = {
    ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)
  }
  random_uses = {use for use in uses if use.startswith("np.random.")}
  assert random_uses == {"np.random.Philox"}
  imported = {
    alias.name
    for node in ast.walk(tree)
    if isinstance(node, (ast.Import, ast.ImportFrom))
    for alias in node.names
  }
  assert "numpy" in imported
  assert not imported & {"random", "secrets", "jax", "scipy"}
  assert any(use.endswith(".random_raw") for use in uses)


def test_sampling_imports_no_jax():
  program = (
    "import sys; sys.modules['jax'] = None; from dpdist import sampling; "
    "draw = sampling.PoissonSampler("
    "num_examples=9, sampling_probability=0.1, seed=1); draw(1)"
  )
  root = pathlib.Path(sampling.__file__).parents[2]
  subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


# Seeds.


def test_an_int_and_bytes_are_never_the_same_seed():
  seeds = [5, -5, 0, 53, 2**64 + 5, 2**128 + 5, 10**5000]
  seeds += [b"\x05", b"5", b"\0", b"\0\0", b"int:5", b"\x05" + bytes(7)]
  draws = {make(10**5, 0.01, seed)(0).tobytes() for seed in seeds}
  assert len(draws) == len(seeds)
  assert np.array_equal(make(100, 0.1, np.int8(-5))(0), make(100, 0.1, -5)(0))


def test_the_seed_is_not_shown():
  for seed in (987654321, b"987654321"):
    assert "987654321" not in repr(make(100, 0.25, seed))
  assert repr(make(100, 0.25)) == (
    "PoissonSampler(num_examples=100, sampling_probability=0.25, seed=<secret>)"
  )


# What every draw is like.


@hypothesis.settings(deadline=None, max_examples=150, derandomize=True)
@hypothesis.given(
  num_examples=st.integers(1, 2**62),
  expected=st.floats(1e-9, 3000),
  seed=st.integers() | st.binary(min_size=1),
  step=st.integers(0, 2**63 - 1),
)
def test_a_draw_is_sorted_unique_int64_and_in_range(
  num_examples, expected, seed, step
):
  sampler = make(num_examples, min(1.0, expected / num_examples), seed)
  drawn = sampler(step)
  assert drawn.dtype == np.int64
  assert drawn.ndim == 1
  assert (np.diff(drawn) > 0).all()
  assert ((drawn >= 0) & (drawn < num_examples)).all()
  # By Bernstein's inequality, a larger draw has a probability below 1e-7.
  assert len(drawn) <= expected + 11 * math.sqrt(expected) + 11


def test_certain_examples_are_all_drawn():
  drawn = make(1000, 1)(3)
  assert drawn.dtype == np.int64
  assert drawn.tolist() == list(range(1000))


def test_a_draw_can_be_empty():
  drawn = make(10, 1e-300)(0)
  assert drawn.dtype == np.int64
  assert drawn.shape == (0,)
  assert make(1, 5e-324)(0).shape == (0,)


@pytest.mark.parametrize(
  ("num_examples", "probability"),
  [(1, 0.1), (3, 0.1), (10**6, 1e-3), (2**62, 1e-12), (10**5, 0.1249)],
)
def test_blocks_are_no_larger_than_needed(num_examples, probability):
  bits = poisson._block_bits(num_examples, probability)
  assert 2**bits * probability < 4
  assert 2**bits * probability >= 2 or 2**bits >= num_examples
  assert bits == 1 or 2 ** (bits - 1) < num_examples


# Guarantees: the law of a draw.


@pytest.mark.parametrize(
  ("num_examples", "probability"),
  [(6, 0.3), (6, 0.8), (6, 0.124), (5, 0.12), (3, 0.12), (1, 0.1)],
)
def test_all_subsets_have_their_probability(num_examples, probability):
  num_steps = 20_000
  sampler = make(num_examples, probability, seed=b"subsets")
  subsets = [int((1 << sampler(step)).sum()) for step in range(num_steps)]
  chi_square(
    np.bincount(subsets, minlength=2**num_examples),
    num_steps * subset_law(num_examples, probability),
  )


@pytest.mark.parametrize("probability", [0.5, 0.124, 0.07, 0.01])
@pytest.mark.parametrize("offset", [0, 13, 28])
def test_neighbours_are_independent(probability, offset):
  # Windows of 8 neighbours: all of them within a block of 32 or more, or, at
  # offset 28, some of them across the border of two blocks.
  num_windows = 60_000
  included = np.zeros(32 * num_windows + 32, dtype=np.int64)
  included[make(included.size, probability, seed=b"neighbours")(0)] = 1
  windows = included[offset:][: 32 * num_windows].reshape(-1, 32)[:, :8]
  chi_square(
    np.bincount(windows @ (1 << np.arange(8)), minlength=2**8),
    num_windows * subset_law(8, probability),
  )


@pytest.mark.parametrize("probability", [0.8, 0.12, 0.03, 0.003])
def test_batch_sizes_are_binomial(probability):
  num_examples, num_steps = 3000, 2500
  sampler = make(num_examples, probability, seed=b"sizes")
  sizes = [len(sampler(step)) for step in range(num_steps)]
  law = stats.binom(num_examples, probability)
  chi_square(
    np.bincount(sizes, minlength=num_examples + 1),
    num_steps * law.pmf(np.arange(num_examples + 1)),
  )
  score = (np.mean(sizes) - law.mean()) / (law.std() / math.sqrt(num_steps))
  assert 2 * stats.norm.sf(abs(score)) > ERROR_RATE
  # The fourth moment of a binomial is near that of a normal distribution.
  ratio = np.var(sizes) / law.var()
  assert abs(ratio - 1) < 6 * math.sqrt(2 / num_steps)


@pytest.mark.parametrize(
  ("num_examples", "probability"), [(5000, 0.9), (5003, 0.05)]
)
def test_every_example_is_drawn_equally_often(num_examples, probability):
  num_steps = 3000
  sampler = make(num_examples, probability, seed=b"inclusions")
  counts = np.zeros(num_examples)
  for step in range(num_steps):
    counts[sampler(step)] += 1
  variance = num_steps * probability * (1 - probability)
  statistic = ((counts - num_steps * probability) ** 2).sum() / variance
  assert stats.chi2.sf(statistic, num_examples) > ERROR_RATE
  assert stats.chi2.cdf(statistic, num_examples) > ERROR_RATE


@pytest.mark.parametrize("probability", [0.25, 0.05])
def test_steps_and_seeds_are_independent(probability):
  num_examples, num_steps = 50_000, 60
  draws = {
    seed: [make(num_examples, probability, seed)(t) for t in range(num_steps)]
    for seed in (1, 2)
  }

  def overlap_is_independent(pairs):
    common = [np.intersect1d(a, b, assume_unique=True).size for a, b in pairs]
    mean = len(pairs) * num_examples * probability**2
    # An overlap of two steps is Binomial(n, q^2), but two overlaps share a
    # step: their covariance is n q^3 (1 - q), for at most two others each.
    variance = mean * (1 + 2 * probability)
    score = (sum(common) - mean) / math.sqrt(variance)
    assert 2 * stats.norm.sf(abs(score)) > ERROR_RATE

  for lag in (1, 2, 3, 4, 16):
    overlap_is_independent(list(zip(draws[1], draws[1][lag:], strict=False)))
  overlap_is_independent(list(zip(draws[1], draws[2], strict=True)))
  overlap_is_independent(list(zip(draws[1], draws[2][1:], strict=False)))


def test_an_example_is_drawn_exactly_when_its_word_is_below_q():
  # Philox words with 11 zeros at the end are float64 multiples of 2^-64.
  num_examples, step = 10_000, 8
  key = [int(word) for word in make(1, 0.5, b"exact")._key]
  words = list(itertools.islice(words_of(key, step, 0), num_examples))
  cases = [i for i, word in enumerate(words) if word % 2**11 == 0]
  cases = [i for i in cases if words[i] >= 2**61]
  assert cases
  for i in cases:
    probability = math.ldexp(words[i], -64)
    above = math.nextafter(probability, 1)
    assert i not in make(num_examples, probability, b"exact")(step)
    assert i in make(num_examples, above, b"exact")(step)


# Guarantees: the table and its inversion.


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("probability", [1e-300, 1e-30, 1e-3, 0.01, 0.1249])
def test_the_table_is_the_binomial_distribution(bits, probability):
  if 2**bits * probability >= 4:
    bits = 5
  table = poisson._binomial_table(bits, probability)
  exact = exact_binomial_table(2**bits, probability)
  assert table == exact[: len(table)]
  # What lies above the last entry is too little for 128 bits.
  assert all(2**128 - entry <= 2 for entry in exact[len(table) :])


@pytest.mark.parametrize("probability", [0.1249, 1e-3, 3e-7, 1e-12, 2.0**-60])
def test_the_table_of_a_large_block_is_near_the_binomial(probability):
  # Not bit for bit, since decimals are rounded, but far nearer than
  # the total variation distance of 2^-120 that is promised needs.
  bits = poisson._block_bits(2**62, probability)
  num_examples = 2**bits
  table = poisson._binomial_table(bits, probability)
  with decimal.localcontext(prec=120):
    q = decimal.Decimal(probability)
    term = (1 - q) ** num_examples
    cumulative = term
    distance = decimal.Decimal(0)
    previous = 0
    for k, entry in enumerate([*table, 2**128]):
      distance += abs(decimal.Decimal(entry - previous) / 2**128 - term) / 2
      previous = entry
      term *= (num_examples - k) * q / ((k + 1) * (1 - q))
      cumulative += term
    distance += abs(1 - cumulative)
    assert distance < decimal.Decimal(2) ** -120
  assert table == sorted(table)
  assert len(table) < 100


def test_a_count_is_inverted_at_both_words():
  table = [5 << 64, (5 << 64) + 7, 9 << 64, (WORD << 64) + 3, (WORD << 64) + 9]
  cases = [
    # (high, low, count)
    (0, WORD, 0),
    (4, WORD, 0),
    (5, 0, 1),
    (5, 6, 1),
    (5, 7, 2),
    (5, WORD, 2),
    (6, 0, 2),
    (8, WORD, 2),
    (9, 0, 3),
    (9, WORD, 3),
    (WORD - 1, WORD, 3),
    (WORD, 0, 3),
    (WORD, 2, 3),
    (WORD, 3, 4),
    (WORD, 8, 4),
    (WORD, 9, 5),
    (WORD, WORD, 5),
  ]
  highs, lows, counts = zip(*cases, strict=True)
  inverted = poisson._invert(
    table, np.array(highs, dtype=np.uint64), lows.__getitem__
  )
  assert inverted.dtype == np.int64
  assert tuple(inverted.tolist()) == counts


def test_the_low_word_is_asked_for_only_where_it_decides():
  def never(i):
    raise AssertionError(f"asked for the low word of {i}")

  highs = np.array([1, 4, 6, 10], dtype=np.uint64)
  counts = poisson._invert([5 << 64, (5 << 64) + 7, 9 << 64], highs, never)
  assert counts.tolist() == [0, 0, 2, 3]
  assert poisson._invert([], highs, never).tolist() == [0] * 4


def test_a_tie_takes_the_low_word_of_its_block(monkeypatch):
  # Tables whose high halves are words that come up, so that ties happen.
  sampler = make(2000, 0.01, seed=b"ties")
  key = [int(word) for word in sampler._key]
  num_blocks = -(-2000 >> sampler._block_bits)
  assert num_blocks > 4  # Philox gives four words at a time.
  highs = list(itertools.islice(words_of(key, 6, 1), num_blocks))
  lows = list(itertools.islice(words_of(key, 6, 2), num_blocks))
  numbers = [(h << 64) + x for h, x in zip(highs, lows, strict=True)]
  table = sorted(numbers)
  expected = [bisect.bisect_right(table, number) for number in numbers]
  assert sorted(expected) == list(range(1, num_blocks + 1))
  seen = []
  invert = poisson._invert

  def record(*args):
    seen.append(invert(*args).tolist())
    return np.array(seen[-1])

  monkeypatch.setattr(poisson, "_invert", record)
  sampler._count_table = table
  sampler(6)
  sampler._count_table = [entry + 1 for entry in table]
  sampler(6)
  assert seen == [expected, [count - 1 for count in expected]]


# Arguments.


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("num_examples", 0),
    ("num_examples", -1),
    ("num_examples", 2**62 + 1),
    ("num_examples", 10.0),
    ("num_examples", True),
    ("num_examples", "10"),
    ("num_examples", None),
    ("sampling_probability", 0),
    ("sampling_probability", 0.0),
    ("sampling_probability", -0.1),
    ("sampling_probability", 1 + 2**-52),
    ("sampling_probability", 2),
    ("sampling_probability", math.nan),
    ("sampling_probability", math.inf),
    ("sampling_probability", -math.inf),
    ("sampling_probability", True),
    ("sampling_probability", "0.1"),
    ("sampling_probability", 0.1j),
    ("sampling_probability", None),
    ("step", -1),
    ("step", 2**63),
    ("step", True),
    ("step", np.True_),
    ("step", 1.0),
    ("step", np.float32(1)),
    ("step", "1"),
    ("step", None),
  ],
)
def test_a_bad_argument_is_named(name, value):
  arguments = {"num_examples": 10, "sampling_probability": 0.1, "step": 0}
  arguments[name] = value
  step = arguments.pop("step")
  with pytest.raises(ValueError) as error:
    sampling.PoissonSampler(**arguments, seed=1)(step)
  assert str(error.value).startswith(f"{name} must be ")
  assert str(error.value).endswith(f", got {value!r}")


@pytest.mark.parametrize("seed", [b"", "987", None, 987.5, True, [987], (1,)])
def test_a_bad_seed_is_refused_but_not_shown(seed):
  with pytest.raises(ValueError, match=r"^seed must be an int or ") as error:
    make(10, 0.1, seed)
  assert "987" not in str(error.value)


def test_numpy_numbers_are_accepted():
  sampler = make(np.int32(1000), np.float32(0.1), np.uint64(3))
  other = make(1000, float(np.float32(0.1)), 3)
  assert sampler(np.uint64(4)).tolist() == other(4).tolist()
  assert repr(sampler) == repr(other)

"""How far rounding can move a sum of clipped gradients.

The theorem, its proof and what it rests on are in docs/rounding.md. In short,
two neighboring data sets may be laid out in quite different chunks, and the
float sums of both be wrong in opposite directions. The sensitivity is therefore
at most C (1 + r), with r = `Bound.across` + `Bound.inside`:

  across  what adding up microbatches, chunks and devices, and adding the noise,
          can lose. It is done with two floats a number
          (`dpdist.sums.compensated`), and is far below 1e-3.
  inside  what the float sums over the examples of one microbatch can lose: 0
          where it is one example.
"""

import math
from typing import NamedTuple

from dpdist.privacy import plan as plan_lib
from dpdist.privacy import schedule

# A step with more examples than `most_examples` comes with less than this.
TAIL = 2.0**-64

# Of a float32 that is rounded to nearest.
_ROUNDOFF = 2.0**-24
# Matrix units of accelerators may drop the last bits instead.
_CUT_ROUNDOFF = 2.0**-23
# Of the rests that the devices' sums leave, in clip norms.
_TOLERANCE = 2.0**-14


# How much earlier, in clip norms, exact sums clip for what rounds in a group.
ROOM = 2.0**-11


class Bound(NamedTuple):
  """What rounding can add to the sensitivity, in clip norms.

  Attributes:
    num_examples: that a step can hold; see `most_examples`.
    part_size: examples that one float sum adds up, at most.
    across: of all sums of such parts, and of the noise; proven for any model.
    inside: of the parts, in any order of additions: proven for layers that an
      example passes once, and for any model where part_size is 1.
  """

  num_examples: int
  part_size: int
  across: float
  inside: float

  def __str__(self) -> str:
    return (
      f"{self.across:.1g} across parts, {self.inside:.1g} inside parts of"
      f" {self.part_size}"
    )

  def to_dict(self) -> dict[str, float]:
    """As JSON carries it."""
    return self._asdict()


def bound(
  plan: plan_lib.PrivacyPlan,
  *,
  microbatch_size: int,
  rows_per_device: int,
  num_entries: int,
  num_devices: int = 1,
  num_sharing: int = 1,
  is_cut: bool = False,
  is_exact: bool = False,
) -> Bound:
  """What rounding can add to the sensitivity of a step.

  Args:
    plan: the numbers.
    microbatch_size: examples that a device works on at once, at most.
    rows_per_device: of a chunk; with exact sums, of a group.
    num_entries: of the gradient.
    num_devices: that divide the examples of a chunk.
    num_sharing: of them, that add up the sums of a microbatch each at once.
    is_cut: whether sums inside a part may drop bits, as on an accelerator.
    is_exact: whether groups are added up in integers.
  """
  most = most_examples(plan)
  size = min(microbatch_size * num_sharing, most)
  inside = _inside(plan, most, size, is_cut)
  parts = -(-rows_per_device // microbatch_size)
  if is_exact:
    # Examples are clipped earlier by as much; noise is added in integers.
    across = _sums(most, parts, 0)
    return Bound(most, size, across, max(0, inside - ROOM))
  chunks = most // (rows_per_device * num_devices) + 1
  across = _sums(most, parts, chunks) + _ends(
    plan, most, num_entries, num_devices
  )
  return Bound(most, size, across, inside)


def _inside(
  plan: plan_lib.PrivacyPlan, most: int, size: int, is_cut: bool
) -> float:
  """Of the float sums of parts of `size` examples, both neighbors' together."""
  if size == 1:
    # What one gradient is rounded by depends on no other example.
    return 0.0
  roundoff = _CUT_ROUNDOFF if is_cut else _ROUNDOFF
  # An addition errs by the roundoff times its result, which is at most as long
  # as it has terms. In any order n terms make n - 1 of them, the largest
  # results those of adding one term at a time: 2 + ... + n < n (n + 1) / 2.
  growth = 1 / (1 - size * roundoff)
  if plan.neighboring_relation == "add_or_remove_one":
    # All that follow move up by a place, and all parts may change.
    terms = most * (size + 1) / 2
  else:
    terms = size * (size + 1) / 2
  return 2 * growth * roundoff * terms


def _sums(most: int, parts: int, chunks: int) -> float:
  """Of parts in chunks and on devices, both neighbors' together."""
  # A part is added to its device's sum of the chunk, and that, high and low, to
  # the device's accumulator. An addition errs by 2 u^2 of its result, which is
  # no longer than the device has examples, of the chunk or of the step; those
  # of all devices, or of all chunks, are the step's together.
  return 2 * 2 * _ROUNDOFF**2 * (parts + 2 * chunks) * most


def _ends(
  plan: plan_lib.PrivacyPlan, most: int, num_entries: int, num_devices: int
) -> float:
  """Of the sum over devices and of the noise, both neighbors' together."""
  units = grid(plan, num_devices, num_entries) if num_devices > 1 else ()
  rests = 0.0
  if units:
    unit = units[-1] / plan.l2_clip_norm
    rests = _rests(unit, num_devices, num_entries)
  sigma = max(x.noise_multiplier for x in plan.settings)
  # A float32 normal ends at 5.42; replacing one doubles the noise.
  noisy = most + 2 * 5.42 * sigma * math.sqrt(num_entries)
  # Units and rest are joined, and noise is added, with 2 u^2 of the result.
  return 2 * (rests + 2 * _ROUNDOFF**2 * (len(units) + 1) * noisy)


def grid(
  plan: plan_lib.PrivacyPlan, num_devices: int, num_entries: int
) -> tuple[float, ...]:
  """Units by which the sums of devices are cut, to be added up exactly.

  Powers of two, falling, public: an entry of the sum of all devices is at most
  `most_examples` clip norms, which is at most 2^23 of the first unit; the rests
  of all devices are at most 2^23 of the next. There are as many units as it
  takes until rounding in the last rests is below 2^-14 clip norms.

  Args:
    plan: the numbers.
    num_devices: among which the sums are added up.
    num_entries: of the gradient.
  """
  largest = most_examples(plan) * plan.l2_clip_norm
  unit = math.ldexp(1.0, math.frexp(largest)[1] - 23)
  units = [unit]
  power = math.frexp(num_devices)[1] - 23
  while (
    _rests(units[-1] / plan.l2_clip_norm, num_devices, num_entries) > _TOLERANCE
  ):
    units.append(math.ldexp(units[-1], power))
  return tuple(units)


def _rests(unit: float, num_devices: int, num_entries: int) -> float:
  """What the float sum of the devices' rests, of a unit each, can lose."""
  additions = num_devices * (num_devices + 1)
  return math.sqrt(num_entries) * _ROUNDOFF * additions * unit


def most_examples(plan: plan_lib.PrivacyPlan) -> int:
  """How many units a step can hold.

  With Poisson sampling more come with a probability below `TAIL` a step, by
  Chernoff's bound: P(X >= k) <= exp(-n D(k/n || q)).
  """
  return max(_most(plan, setting) for setting in plan.settings)


def _most(plan: plan_lib.PrivacyPlan, setting: schedule.Setting) -> int:
  count = -(-plan.num_units // plan.cycle_length)
  if plan.sampling == "fixed_size":
    return math.ceil(setting.expected_batch_size)
  if plan.truncated_batch_size is not None:
    count = min(count, plan.truncated_batch_size)
    return count
  q = plan.probability(setting)
  if q >= 1:
    return count
  low, high = min(count, math.ceil(count * q)), count
  while low < high:
    middle = (low + high) // 2
    if _exponent(middle + 1, count, q) > -math.log(TAIL):
      high = middle
    else:
      low = middle + 1
  return low


def _exponent(k: int, n: int, q: float) -> float:
  """n D(k/n || q) of Chernoff's bound, for k of at least n q; inf for k > n."""
  if k > n:
    return math.inf
  p = k / n
  rest = 0.0 if k == n else (1 - p) * math.log((1 - p) / (1 - q))
  return n * (p * math.log(p / q) + rest)

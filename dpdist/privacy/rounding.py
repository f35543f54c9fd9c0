"""Bounds how far rounding can move a sum of clipped gradients.

The theorem, its proof and its assumptions are in docs/rounding.md. In short,
two neighboring data sets may be laid out in quite different chunks, and the
float sums of both may err in opposite directions. The sensitivity is therefore
at most C (1 + r), with r = `Bound.across` + `Bound.inside`:

  across  the error of adding up microbatches, chunks and devices, and of adding
          the noise. These sums use two floats a number
          (`dpdist.sums.compensated`), so it is far below 1e-3.
  inside  the error of the float sums over the examples of one microbatch; 0
          where that is one example.
"""

import math
from typing import NamedTuple

from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rules

# A step has more than `most_examples` with a probability below this.
TAIL = 2.0**-64

# Relative error of a float32 that is rounded to nearest.
_ROUNDOFF = 2.0**-24
# Matrix units of accelerators may drop the last bits instead.
_CUT_ROUNDOFF = 2.0**-23
# The most error of the sum of the devices' rests, in clip norms.
_TOLERANCE = 2.0**-14


# With exact sums, examples are clipped to less than the clip norm. This part of
# it is the room for rounding inside a group.
ROOM = 2.0**-11


class Bound(NamedTuple):
  """What rounding can add to the sensitivity, in clip norms."""

  num_examples: int  # Most examples that a step can hold; see `most_examples`.
  part_size: int  # Most examples that one float sum adds up.
  # The bound for the sums over such parts, and for the noise; proven for any
  # model.
  across: float
  # The bound for the sums inside parts, in any order of additions; proven for
  # layers that an example passes once, and for any model where part_size is 1.
  inside: float

  def __str__(self) -> str:
    return (
      f"{self.across:.1g} across parts, {self.inside:.1g} inside parts of"
      f" {self.part_size}"
    )

  def to_dict(self) -> dict[str, float]:
    """Returns a JSON-able dict."""
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
  """Returns what rounding can add to the sensitivity of a step.

  rows_per_device are those of a chunk or, with exact sums, of a group.
  num_sharing devices add up their microbatches' sums at once. With is_cut, sums
  inside a part may drop bits, as on an accelerator.
  """
  most = most_examples(plan)
  size = min(microbatch_size * num_sharing, most)
  inside = _inside(plan, most, size, is_cut)
  parts = -(-rows_per_device // microbatch_size)
  if is_exact:
    # Clipping leaves ROOM for rounding inside; noise is added in integers.
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
  """Bounds the error of both neighbors' float sums over parts of `size`."""
  if size == 1:
    # How one gradient is rounded depends on no other example.
    return 0.0
  roundoff = _CUT_ROUNDOFF if is_cut else _ROUNDOFF
  # An addition errs by at most the roundoff times its result, whose norm is at
  # most its number of terms. n terms take n - 1 additions in any order; results
  # are largest when one term is added at a time: 2 + ... + n < n (n + 1) / 2.
  growth = 1 / (1 - size * roundoff)
  if plan.neighboring_relation == "add_or_remove_one":
    # All later examples move up by a place, so all parts may change.
    terms = most * (size + 1) / 2
  else:
    terms = size * (size + 1) / 2
  return 2 * growth * roundoff * terms


def _sums(most: int, parts: int, chunks: int) -> float:
  """Bounds the error of the sums of parts in chunks and on devices."""
  # A part is added to its device's sum of the chunk; then that sum, high and
  # low, to the device's accumulator. An addition errs by at most 2 u^2 of its
  # result, whose norm is at most the number of the device's examples in the
  # chunk or step. Over all devices, or all chunks, these add up to the step's.
  return 2 * 2 * _ROUNDOFF**2 * (parts + 2 * chunks) * most


def _ends(
  plan: plan_lib.PrivacyPlan, most: int, num_entries: int, num_devices: int
) -> float:
  """Bounds the error of the sum over devices and of adding the noise."""
  units = grid(plan, num_devices, num_entries) if num_devices > 1 else ()
  rests = 0.0
  if units:
    unit = units[-1] / plan.l2_clip_norm
    rests = _rests(unit, num_devices, num_entries)
  sigma = max(x.noise_multiplier for x in plan.phases)
  # A float32 normal is at most 5.42; "replace_one" doubles the noise.
  noisy = most + 2 * 5.42 * sigma * math.sqrt(num_entries)
  # Joining units and rest, and adding noise, each errs by 2 u^2 of the result.
  return 2 * (rests + 2 * _ROUNDOFF**2 * (len(units) + 1) * noisy)


def grid(
  plan: plan_lib.PrivacyPlan, num_devices: int, num_entries: int
) -> tuple[float, ...]:
  """Returns units into which devices' sums are cut, to add them up exactly.

  They are public, falling powers of two. An entry of the sum of all devices is
  at most `most_examples` clip norms, which is at most 2^23 of the first unit;
  the rests of all devices are at most 2^23 of the next. Units follow until
  rounding in the last rests is below 2^-14 clip norms.
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
  """Bounds the error of the float sum of devices' rests, each of one unit."""
  additions = num_devices * (num_devices + 1)
  return math.sqrt(num_entries) * _ROUNDOFF * additions * unit


def most_examples(plan: plan_lib.PrivacyPlan) -> int:
  """Returns the most units of privacy that a step can hold.

  If the sampling has no bound, more are drawn with a probability below `TAIL`.
  """
  sampling = rules.sampling_of(plan)
  return max(
    sampling.most_rows(plan, phase.expected_batch_size, TAIL)
    for phase in plan.phases
  )

"""Defines the pair of distributions that an accountant composes for a step.

However a step samples and whatever the neighboring relation, its privacy is
that of one pair of distributions (a dominating pair: Zhu, Dong & Wang 2022,
arXiv:2106.08567). There are five kinds here, all of Gaussians on a line whose
unit is the clip norm C, and noise of standard deviation sigma. Proofs that are
in no paper are in docs/accounting.md.

  "presence"  q N(1) + (1-q) N(0) against N(0): with probability q the data of
              one unit are in the sum, or they are not. (Mironov, Talwar & Zhang
              2019, arXiv:1908.10530.)
  "opposite"  q N(1) + (1-q) N(0) against q N(-1) + (1-q) N(0): with probability
              q, whatever the rest of the sample is, a unit contributes to the
              sum, and its data may be any other in the other data set.
  "exchange"  as "opposite", but the rest of the sum may depend on whether the
              unit is in the sample, as it does where all samples have the same
              size. The unit here is the l2 distance of the exchange, twice
              the clip norm. Amplification by advanced joint convexity bounds
              the hockey-stick divergence of order a >= 1 by that of q N(1) +
              (1-q) N(0) against N(0), and that of order a < 1 by the same with
              the distributions exchanged (Balle, Barthe & Gaboardi 2018,
              arXiv:1807.01647; Zhu, Dong & Wang 2022). The larger of what
              adding and removing compose to need not be a bound: Lebeda et al.
              2024, arXiv:2405.20769.
  "binomial"  the sum has K of a unit's rows, K from Binomial(k, q).
  "truncated" as "presence", but a sample of more than B of n rows is cut to B.
              Where it is cut, a unit that is kept takes another's place. That
              happens with a probability of less than q and moves the sum by at
              most 2 (after "Tighter Privacy Analysis for Truncated Poisson
              Sampling", 2025, arXiv:2508.15089).

Imports no jax, and no accountant.
"""

from typing import NamedTuple

SAMPLINGS = ("poisson", "truncated_poisson", "cyclic_poisson", "fixed_size")
NEIGHBORING_RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")


class Pair(NamedTuple):
  """The dominating pair of one step.

  Attributes:
    kind: "presence", "opposite", "exchange", "binomial" or "truncated".
    sigma: standard deviation of the noise, in the kind's unit.
    q: the probability that a row takes part, in (0, 1].
    rows: k of "binomial".
    num_examples: n of "truncated", the rows of the larger data set.
    limit: B of "truncated".
    is_in_place: whether a missing row of "truncated" leaves its place empty.
    is_either: whether the larger data set may also have one row less than
      num_examples. Which of the two is worse depends on the limit.
  """

  kind: str
  sigma: float
  q: float
  rows: int = 1
  num_examples: int = 0
  limit: int = 0
  is_in_place: bool = False
  is_either: bool = False

  @property
  def has_renyi(self) -> bool:
    """Returns whether there is a bound on its Renyi divergences."""
    return self.kind in ("presence", "opposite", "exchange")

  @property
  def with_renyi(self) -> "Pair":
    """Returns a pair with a Renyi bound that dominates this one, or this one.

    For several rows, all of them take part or none, with at least the
    probability that any of them does. For a truncated sample, however the rest
    is cut, the unit is kept with probability at most q, and without it another
    may be in its place.
    """
    if self.kind == "binomial":
      q = min(1.0, self.rows * self.q)
      return Pair("presence", self.sigma / self.rows, q)
    if self.kind == "truncated":
      return Pair("exchange", self.sigma / 2, self.q)
    return self


def of(
  *,
  noise_multiplier: float,
  sampling_probability: float,
  sampling: str = "poisson",
  neighboring_relation: str = "add_or_remove_one",
  num_examples: int | None = None,
  truncated_batch_size: int | None = None,
  cycle_length: int = 1,
  examples_per_user: int = 1,
  group_size: int = 1,
  may_grow: bool = False,
) -> Pair:
  """Returns the pair of one step in which a unit can take part.

  Args:
    noise_multiplier: noise standard deviation over the l2 sensitivity of the
      clipped sum under the relation, which for "replace_one" is twice the clip
      norm; see `dpdist.clipping.ClippedGrad.sensitivity`.
    sampling_probability: the probability that a row takes part in such a step;
      with "fixed_size" the sample size over the number of examples.
    sampling: one of `SAMPLINGS`.
    neighboring_relation: one of `NEIGHBORING_RELATIONS`.
    num_examples: rows of the larger one of two neighbouring data sets; only
      for "truncated_poisson", which needs it.
    truncated_batch_size: the size to which a larger sample is cut; only for
      "truncated_poisson", which needs it.
    cycle_length: the number of parts that take turns; only for
      "cyclic_poisson". Rows are divided among them by their numbers, so a unit
      takes part in one of so many steps. Where a row is missing, its place
      stays empty ("zero_out").
    examples_per_user: how many rows a unit has; each is drawn independently.
    group_size: how many rows are averaged and clipped as one. The rows of a
      group are always the same, and where one is missing, its place stays
      empty. A group is drawn as a whole, and one row can reverse the group's
      gradient, which is an exchange.
    may_grow: whether the data set has one row less than num_examples, and must
      be hard to tell both from the larger one and from a smaller one.

  Raises:
    ValueError: the settings are those of no mechanism with a proof.
  """
  _check_settings(
    sampling,
    neighboring_relation,
    num_examples,
    truncated_batch_size,
    cycle_length,
    examples_per_user,
    group_size,
  )
  sigma, q = noise_multiplier, sampling_probability
  if truncated_batch_size is not None:
    assert num_examples is not None
    if truncated_batch_size >= num_examples:
      return Pair("presence", sigma, q)
    return Pair(
      "truncated",
      sigma,
      q,
      num_examples=num_examples,
      limit=truncated_batch_size,
      is_in_place=neighboring_relation == "zero_out",
      is_either=may_grow,
    )
  is_replaced = neighboring_relation == "replace_one"
  if q == 1:  # All rows of a unit are always in the sum: one Gaussian.
    reach = examples_per_user * (1 if is_replaced or group_size == 1 else 2)
    return Pair("presence", sigma / reach, q)
  if examples_per_user > 1:
    return Pair("binomial", sigma, q, rows=examples_per_user)
  if sampling == "fixed_size":
    return Pair("exchange", sigma, q)
  if is_replaced:
    # The noise multiplier is in units of twice the clip norm. A row of a group
    # can exchange no more than the whole gradient either.
    return Pair("opposite", 2 * sigma, q)
  return Pair("opposite" if group_size > 1 else "presence", sigma, q)


def num_turns(num_steps: int, cycle_length: int = 1) -> int:
  """Returns in how many of the steps a unit can take part."""
  return -(-num_steps // cycle_length)


def _check_settings(
  sampling: str,
  neighboring_relation: str,
  num_examples: int | None,
  truncated_batch_size: int | None,
  cycle_length: int,
  examples_per_user: int,
  group_size: int,
) -> None:
  """Raises ValueError for combinations of settings that no mechanism has."""
  _check_one_of("sampling", sampling, SAMPLINGS)
  _check_one_of(
    "neighboring_relation", neighboring_relation, NEIGHBORING_RELATIONS
  )
  for name, count in (
    ("cycle_length", cycle_length),
    ("examples_per_user", examples_per_user),
    ("group_size", group_size),
  ):
    _check_count(name, count)
  if (truncated_batch_size is not None) != (sampling == "truncated_poisson"):
    raise ValueError(
      "truncated_batch_size must be given with sampling='truncated_poisson',"
      f" and not without, got {truncated_batch_size!r} with {sampling!r}"
    )
  if truncated_batch_size is not None:
    _check_count("truncated_batch_size", truncated_batch_size)
    if num_examples is None:
      raise ValueError(
        "num_examples must be given with sampling='truncated_poisson', got None"
      )
    _check_count("num_examples", num_examples)
  if cycle_length > 1 and sampling != "cyclic_poisson":
    raise ValueError(
      f"cycle_length must be 1 unless sampling='cyclic_poisson', got"
      f" {cycle_length} with {sampling!r}"
    )
  if sampling == "fixed_size" and neighboring_relation != "replace_one":
    raise ValueError(
      "neighboring_relation must be 'replace_one' with sampling='fixed_size',"
      " where a row more is a row less of something else, got"
      f" {neighboring_relation!r}"
    )
  if neighboring_relation == "add_or_remove_one":
    for name, count in (
      ("cycle_length", cycle_length),
      ("group_size", group_size),
    ):
      if count > 1:
        raise ValueError(
          "neighboring_relation must be 'zero_out' or 'replace_one' with"
          f" {name} above 1, which goes by the numbers of rows: one that is"
          " taken away would move all that follow; got 'add_or_remove_one'"
        )
  if sampling == "truncated_poisson" and neighboring_relation == "replace_one":
    raise ValueError(
      "neighboring_relation must be 'add_or_remove_one' or 'zero_out' with"
      " sampling='truncated_poisson', got 'replace_one'"
    )
  if examples_per_user > 1:
    if sampling != "poisson":
      raise ValueError(
        "sampling must be 'poisson' with examples_per_user above 1, got"
        f" {sampling!r}"
      )
    if neighboring_relation == "replace_one":
      raise ValueError(
        "neighboring_relation must be 'add_or_remove_one' or 'zero_out' with"
        " examples_per_user above 1, got 'replace_one'"
      )
    if group_size > 1:
      raise ValueError(
        "group_size must be 1 with examples_per_user above 1, got"
        f" {group_size}: whose rows are in a group is not known"
      )
  if group_size > 1 and sampling not in ("poisson", "cyclic_poisson"):
    raise ValueError(
      "sampling must be 'poisson' or 'cyclic_poisson' with group_size above 1,"
      f" got {sampling!r}"
    )


def _check_one_of(name: str, value: str, right: tuple[str, ...]) -> None:
  if value not in right:
    raise ValueError(f"{name} must be one of {right}, got {value!r}")


def _check_count(name: str, value: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

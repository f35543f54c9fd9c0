"""Releases the private statistics of a run's data, once they are charged.

Every plan that has them counts them once, from its first step on; see
`dpdist.privacy.rules.steps`. So they are charged as soon as one step is.

Guarantees:
  * Nothing is computed from the data before a step of the present plan is
    charged to the run, for these data and this query.
  * The noise is a function of the run's secret, and of all that is released but
    the noise: the run, the data, the query, the noise multiplier and the exact
    sums. So no key meets two inputs, and whoever starts the run again, on any
    branch, gets the same release, which tells nothing new.
  * The standard deviation of the noise on each sum is the plan's multiplier
    times the l2 sensitivity of all sums together under its relation, for one
    row, or for a user where users are the unit.
"""

from collections.abc import Mapping
import hashlib
import json
import os
import pathlib
from typing import Any

import ml_collections

from dpdist import config as config_lib
from dpdist import errors
from dpdist.data import queries
from dpdist.data import sources
from dpdist.data import statistics as statistics_lib
from dpdist.data import users
from dpdist.files import atomic
from dpdist.files import json_fields
from dpdist.keys import keys
from dpdist.ledger import ledger as ledger_lib
from dpdist.noise import decimal_gaussian
from dpdist.privacy import plan as plan_lib

FILE = "statistics.json"
"""In a run's directory: what was released. It is for people; runs compute it
anew, and commands read it from the checkpoint."""

_FORMAT = 1
_STREAM = "private_statistics"


def asked(
  config: ml_collections.ConfigDict, train: sources.Source
) -> tuple[statistics_lib.Statistics | None, dict[str, Any]]:
  """Returns what the data asks for, and the settings for the ledger.

  These are the privacy settings, and what is asked. Raises ValueError unless
  they pay for it, and for nothing else.
  """
  found = sources.private_statistics(train)
  sigma = config.privacy.statistics_noise_multiplier
  if (found is not None) != (sigma > 0):
    right = "above 0 for a data set with private_statistics"
    if found is None:
      right = "0 for a data set without private_statistics"
    raise errors.ArgumentError(
      f"privacy.statistics_noise_multiplier must be {right}, got {sigma}"
    )
  settings = config_lib.privacy_dict(config)
  if found is not None:
    settings[ledger_lib.STATISTICS] = found.digest()
  return found, settings


def release(
  ledger: ledger_lib.Ledger,
  secret: bytes,
  *,
  statistics: statistics_lib.Statistics,
  source: Any,
  plan: plan_lib.PrivacyPlan,
  data: str,
  earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns what is released, JSON-able; reads all rows.

  Args:
    ledger: of the run; at least one step of its plan is charged.
    secret: of the run.
    statistics: what is asked.
    source: the training part.
    plan: that of the run.
    data: the digest of the data, as the ledger has it.
    earlier: what the checkpoint has that the run goes on from; None: nothing.

  Raises:
    LedgerError: they are not charged, or others were released for this charge.
  """
  _check_charged(ledger, statistics, plan, data)
  unit_of_row = None
  if isinstance(source, users.UserSource):
    # Groups are clipped as one, but their rows are the units of privacy.
    if plan.unit == "user":
      unit_of_row = source.unit_of_example
    source = source.examples
  sums = statistics.sums(source.measured, len(source), unit_of_row)
  reach = 2 if plan.neighboring_relation == "replace_one" else 1
  sigma = plan.statistics_noise_multiplier
  stddev = sigma * reach * queries.UNIT
  said = {
    "format": _FORMAT,
    "query": statistics.digest(),
    "data": data,
    "noise_multiplier": sigma,
    "neighboring_relation": plan.neighboring_relation,
    "unit": plan.unit,
    "num_units": plan.num_examples,
  }
  facts = [said, ledger.run, stddev.hex(), [str(x) for x in sums]]
  digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
  key = keys.derive(secret, _STREAM, branch=digest.hexdigest())
  noise = decimal_gaussian.integers(key, len(sums), stddev)
  noisy = [x + z for x, z in zip(sums, noise, strict=True)]
  columns = statistics.answers(
    noisy, num_units=plan.num_examples, stddev=stddev
  )
  # As the job's other processes get it.
  made: dict[str, Any] = json.loads(json.dumps(said | {"columns": columns}))
  if earlier and is_of(earlier, ledger) and earlier != made:
    # Rows that change from reading to reading have another sum each time.
    raise errors.LedgerError(
      "private statistics must be those that this run has released, and are"
      " others: the data gives other rows than it did, under the same digest"
    )
  return made


def _check_charged(
  ledger: ledger_lib.Ledger,
  statistics: statistics_lib.Statistics,
  plan: plan_lib.PrivacyPlan,
  data: str,
) -> None:
  segment = ledger.segment
  is_of_these = (
    plan.statistics_noise_multiplier > 0
    and segment.plan == plan
    and segment.data == data
    and segment.config.get(ledger_lib.STATISTICS) == statistics.digest()
  )
  if not is_of_these or segment.charged < 1:
    raise errors.LedgerError(
      "private statistics must be charged before they are released: the ledger"
      f" has {segment.charged} steps of a plan"
      + (" with them" if is_of_these else " without these")
    )


def is_of(released: Mapping[str, Any], ledger: ledger_lib.Ledger) -> bool:
  """Returns whether this was released under the present plan."""
  segment = ledger.segment
  return (
    released["query"] == segment.config.get(ledger_lib.STATISTICS)
    and released["data"] == segment.data
    and released["noise_multiplier"] == segment.plan.statistics_noise_multiplier
  )


def write(workdir: pathlib.Path, released: Mapping[str, Any]) -> None:
  """Writes what was released to a run's directory."""
  text = json_fields.text(released) + "\n"
  atomic.write(workdir / FILE, text.encode())


def of_test(
  source: Any, released: Mapping[str, Any] | None, path: str | os.PathLike[str]
) -> sources.Source:
  """Returns held-out data as a checkpoint's statistics make it.

  Args:
    source: the held-out part.
    released: what the checkpoint has; None: nothing.
    path: of the checkpoint, for messages.

  Raises:
    ValueError: the data asks for other statistics than the checkpoint has.
  """
  there = "" if released is None else str(released["query"])
  found = sources.private_statistics(source)
  if (found.digest() if found is not None else "") != there:
    raise errors.ArgumentError(
      "private_statistics of the data set must be those of the run, whose"
      f" checkpoint {os.fspath(path)} has {there[:12] or 'none'}, got"
      f" {found.digest()[:12] if found is not None else 'none'}"
    )
  made: sources.Source = source
  if released is not None:
    made = sources.with_statistics(source, released["columns"])
  return made


def rows(released: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns a table of what was released, for the screen and the report."""
  found = []
  for name, answers in released["columns"].items():
    parts = [
      f"{key.replace('_', ' ')} {value:.4g}"
      for key, value in answers.items()
      if isinstance(value, float)
    ]
    if "counts" in answers and answers["kind"] == "counts":
      pairs = zip(answers["values"], answers["counts"], strict=True)
      counts = [f"{value}: {count:,.0f}" for value, count in pairs]
      parts = [*counts[:_MANY], *(["..."] * (len(counts) > _MANY)), *parts]
    text = f"{answers['kind']}: {', '.join(parts)}"
    found.append((f"private statistics of {name}", text))
  return found


_MANY = 6  # The most counts that are shown.

"""The settings and the data of a session, in the form that a run has them."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, TypedDict

import ml_collections
import numpy as np

from dpdist import _validation
from dpdist import config as config_lib
from dpdist import errors
from dpdist.data import arrays as arrays_lib
from dpdist.data import dataset as dataset_lib
from dpdist.data import retry
from dpdist.data import sources
from dpdist.data import users
from dpdist.privacy import plan as plan_lib
from dpdist.reporting import console
from dpdist.training import setup

Loss = Callable[..., Any]

# Where a config has the options that are named otherwise there.
_PLACES = {
  "changed_to": "data.changed_to",
  "method": "clipping.method",
  "microbatch_size": "clipping.microbatch_size",
  "sentinel_every": "sentinel.every",
}


class Options(TypedDict, total=False):
  """The options of a session that most do without.

  Attributes:
    checkpoint_every: steps; by default ten times a run.
    max_checkpoints: how many are kept, at least 2; by default 3.
    chunk_size: examples on all devices at once; by default what most draws fit
      in.
    method: see `dpdist.clipped_grad`.
    microbatch_size: likewise.
    sentinel_every: one step in so many looks for examples that are longer than
      their norms say; 0: none; by default 100. See
      `dpdist.sensitivity.sentinel`.
    stuck_after: in a job of several processes, seconds that a part of a step
      may take; 0: no limit; by default 600.
    ledger: where the ledger is; by default in workdir.
    secret_file: where the run's secret is; by default in workdir.
    data_budget: "location", "epsilon" and "delta" of a budget that all runs on
      the data share.
    changed_to: the digest of data that was changed since the run began.
    insecure_seed: fixes all randomness, for tests; the guarantee is void.
  """

  checkpoint_every: int
  max_checkpoints: int
  chunk_size: int
  method: str
  microbatch_size: int
  sentinel_every: int
  stuck_after: float
  ledger: str
  secret_file: str
  data_budget: Mapping[str, Any]
  changed_to: str
  insecure_seed: int


def config_of(
  privacy: plan_lib.PrivacyConfig | plan_lib.PrivacyPlan,
  options: Options,
  examples_per_unit: int = 0,
) -> ml_collections.ConfigDict:
  """Returns a run's config, with the options of a session.

  Of a user examples_per_unit examples are used in a step; 0: none are users.
  Raises ValueError for a setting that is wrong, or that a loop of one's own
  would have to know of.
  """
  if isinstance(privacy, plan_lib.PrivacyPlan):
    names = {x.name for x in dataclasses.fields(plan_lib.PrivacyConfig)}
    kept = {
      x.name: getattr(privacy, x.name)
      for x in dataclasses.fields(privacy)
      if x.name in names and x.name != "target_epsilon"
    }
    privacy = plan_lib.PrivacyConfig(**kept, target_delta=privacy.delta)
  if not isinstance(privacy, plan_lib.PrivacyConfig):
    raise errors.ArgumentError(
      "privacy must be a dpdist.PrivacyConfig or a dpdist.PrivacyPlan, got"
      f" {privacy!r}"
    )
  for name, right in (
    ("noise", "gaussian"),
    ("clipping", "fixed"),
    ("statistics_noise_multiplier", 0),
  ):
    _validation.require(
      getattr(privacy, name) == right,
      name,
      f"{right!r} in a loop of one's own",
      getattr(privacy, name),
    )
  config = config_lib.default()
  config.data.examples_per_unit = _validation.check(
    "examples_per_unit", examples_per_unit, _validation.integer(0)
  )
  config.privacy = ml_collections.ConfigDict(
    {x.name: getattr(privacy, x.name) for x in dataclasses.fields(privacy)}
  )
  changes: dict[str, Any] = dict(options)
  for name in changes:
    if name not in Options.__annotations__:
      raise errors.ArgumentError(
        f"options must be among {sorted(Options.__annotations__)}, got {name!r}"
      )
  budget = changes.pop("data_budget", {})
  changes |= {f"data_budget.{name}": value for name, value in budget.items()}
  if "stuck_after" in changes:
    changes["stuck_after"] = float(changes["stuck_after"])
  config.update_from_flattened_dict(
    {_PLACES.get(name, name): value for name, value in changes.items()}
  )
  setup.check(config)
  return config


def losses_of(
  loss: Loss | Mapping[str, Loss], num_steps: int
) -> dict[str, Loss]:
  """Returns the losses by name; one alone is named "".

  Raises ValueError if there is none, or if they do not share the plan's steps
  evenly.
  """
  losses = dict(loss) if isinstance(loss, Mapping) else {"": loss}
  if not losses or not all(callable(x) for x in losses.values()):
    raise errors.ArgumentError(
      "loss must be a function (params, example, key) -> loss, or a mapping of"
      f" such functions by name, got {loss!r}"
    )
  _validation.require(
    not num_steps % len(losses),
    "num_steps",
    f"a multiple of {len(losses)}, since each of the losses"
    f" {sorted(losses)} is charged a step of the plan",
    num_steps,
  )
  return losses


def source_of(
  dataset: Any, owners: Any, config: ml_collections.ConfigDict
) -> sources.Source:
  """Returns what holds the training examples, or the users who have them.

  `dataset` is a Source, a mapping of arrays, or an object with a part `train`,
  and may say itself whose its examples are; otherwise owners do, if users are
  the unit. Raises ValueError if it does not fit the config.
  """
  part = getattr(dataset, "train", dataset)
  if isinstance(part, Mapping):
    part = arrays_lib.ArraySource(part)
  source: sources.Source = dataset_lib.Dataset(part, part).train
  if sources.private_statistics(source) is not None:
    raise errors.ArgumentError(
      "dataset must have no private_statistics in a loop of one's own, since"
      " dpdist.train alone releases them: use public_statistics here"
    )
  slots = config.data.examples_per_unit
  has_owners = getattr(dataset, "train_users", None) is not None
  is_of_users = has_owners or isinstance(source, users.UserSource)
  if owners is not None:
    if is_of_users:
      raise errors.ArgumentError(
        "users must be left out for a data set that says itself whose its"
        f" examples are, got {type(owners).__name__}"
      )
    is_of_users = True
  if isinstance(source, users.UserSource):
    _validation.require(
      slots in (0, source.examples_per_unit),
      "examples_per_unit",
      f"that of the users' source, {source.examples_per_unit}, or left out",
      slots,
    )
  else:
    _validation.require(
      (slots > 0) == is_of_users,
      "examples_per_unit",
      "at least 1 where users have the examples, and left out elsewhere",
      slots,
    )
    if has_owners:
      whole = dataset_lib.of(dataset).over_users(slots, name="users")
      source = whole.train
    elif owners is not None:
      source = _owned(source, owners, slots)
  if is_of_users:
    for name, right in ("unit", "user"), ("group_size", 1):
      _validation.require(
        config.privacy[name] == right,
        name,
        f"{right!r} where users have the examples",
        config.privacy[name],
      )
  what = "users" if is_of_users else "training examples"
  _validation.require(
    len(source) == config.privacy.num_examples,
    "num_examples",
    f"the number of {what}, {len(source)}",
    config.privacy.num_examples,
  )
  return source


def refuse_units(owners: Any, config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for users or groups, of a loader of one's own."""
  for name, given, right in (
    ("users", owners, None),
    ("examples_per_unit", config.data.examples_per_unit, 0),
    ("group_size", config.privacy.group_size, 1),
  ):
    # An array of users would compare element by element.
    _validation.require(
      given is None if right is None else given == right,
      name,
      f"{right} without a dataset, whose loader brings a row of each unit",
      given,
    )


def _owned(source: sources.Source, owners: Any, slots: int) -> users.UserSource:
  ids = np.asarray(owners)
  if ids.shape != (len(source),):
    raise errors.ArgumentError(
      f"users must say of each of the {len(source)} examples whose it is, got"
      f" {ids.dtype} {ids.shape}"
    )
  unit_of_example, count = users.number(ids, name="users")
  return users.UserSource(source, unit_of_example, count, slots)


def retried(
  source: sources.Source, config: ml_collections.ConfigDict
) -> tuple[sources.Source, Callable[[], None]]:
  """Returns a source whose failing reads are tried again for some time.

  And a function that closes it.
  """
  examples = retry.RetryingSource(
    source.examples if isinstance(source, users.UserSource) else source,
    name="the data set",
    retry_seconds=config.data.retry_seconds,
    stall_seconds=config.data.stall_seconds,
    tell=console.warn,
  )
  if isinstance(source, users.UserSource):
    return dataclasses.replace(source, examples=examples), examples.close
  return examples, examples.close


def in_units(
  source: sources.Source, config: ml_collections.ConfigDict
) -> sources.Source:
  """Returns a source of what is drawn and clipped as one, from `source_of`'s.

  They are examples, groups of them, or users.
  """
  size = config.privacy.group_size
  return source if size == 1 else users.in_groups(source, size)


def largest_of(dataset: Any, given: Mapping[str, int]) -> dict[str, int]:
  """Returns public upper bounds of integers: those given, and of held-out data.

  1 stands for what is not known.
  """
  test = getattr(dataset, "test", None)
  found = {}
  if test is not None:
    held_out = dataset_lib.Dataset(test, test).test
    for name, x in held_out.read(np.arange(len(held_out))).items():
      if np.issubdtype(x.dtype, np.integer):
        found[name] = int(x.max(initial=1))
  return found | dict(given)

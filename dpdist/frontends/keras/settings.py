"""The settings of a private Keras model, checked once for all of its fits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from dpdist import _validation
from dpdist.distributed import mesh as mesh_lib
from dpdist.frontends import dp_config
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rules

_OPTIONAL_COUNT = _validation.optional(_validation.COUNT)


class Given(NamedTuple):
  """What `make_private` was given, beside model, config and workdir."""

  chunk_size: int | None
  microbatch_size: int | None
  rescale_to_unit_norm: bool
  method: str
  examples_per_unit: int | None
  devices: Sequence[jax.Device] | None
  unsafe_metrics: bool
  sentinel_every: int
  insecure_seed: int | None
  batch_size: int | None = None  # A DPConfig's.


class Settings(NamedTuple):
  """The settings of all fits of a model."""

  mesh: jax.sharding.Mesh
  chunk_size: int
  options: dict[str, Any]  # Of `dpdist.clipped_grad`.
  examples_per_unit: int | None
  unsafe_metrics: bool
  sentinel_every: int
  batch_sizes: tuple[float | None, ...]  # What `fit` takes for batch_size.


def of_dp_config(
  config: plan_lib.PrivacyConfig | plan_lib.PrivacyPlan | dp_config.DPConfig,
  given: Given,
) -> tuple[plan_lib.PrivacyConfig | plan_lib.PrivacyPlan, Given]:
  """Returns the budget of a DPConfig, and the settings with those it has."""
  if not isinstance(config, dp_config.DPConfig):
    return config, given
  is_rescaled = given.rescale_to_unit_norm or config.rescale_to_unit_norm
  seed = given.insecure_seed
  return config.to_privacy_config(), given._replace(
    microbatch_size=given.microbatch_size or config.microbatch_size,
    rescale_to_unit_norm=is_rescaled,
    insecure_seed=config.seed if seed is None else seed,
    batch_size=config.batch_size,
  )


def of(plan: plan_lib.PrivacyPlan, given: Given) -> Settings:
  """Returns the settings for a plan.

  Raises ValueError for one that cannot be used.
  """
  for name, rule in (
    ("sentinel_every", _validation.integer(0)),
    ("microbatch_size", _OPTIONAL_COUNT),
    ("examples_per_unit", _OPTIONAL_COUNT),
  ):
    _validation.check(name, getattr(given, name), rule)
  _validation.require(
    (plan.unit == "user") == (given.examples_per_unit is not None),
    "examples_per_unit",
    "given where the config says unit='user', and None elsewhere",
    given.examples_per_unit,
  )
  mesh = mesh_lib.make(
    {"data": -1, "fsdp": 1, "model": 1},
    jax.local_devices() if given.devices is None else given.devices,
  )
  more = () if given.batch_size is None else (given.batch_size,)
  return Settings(
    mesh,
    _chunk_size(plan, given.chunk_size, given.microbatch_size, mesh),
    {
      "l2_clip_norm": plan.l2_clip_norm,
      "microbatch_size": given.microbatch_size,
      "rescale_to_unit_norm": given.rescale_to_unit_norm,
      "method": given.method,
    },
    given.examples_per_unit,
    given.unsafe_metrics,
    given.sentinel_every,
    (None, plan.expected_batch_size, *more),
  )


def _chunk_size(
  plan: plan_lib.PrivacyPlan,
  chunk_size: int | None,
  microbatch_size: int | None,
  mesh: jax.sharding.Mesh,
) -> int:
  """Returns the examples on the devices at once, as given or chosen."""
  shards = mesh_lib.num_example_shards(mesh)
  if chunk_size is None:
    largest = max(phase.expected_batch_size for phase in plan.phases)
    chunk_size = rules.sampling_of(plan).typical_rows(plan, largest)
    chunk_size += -chunk_size % (shards * (microbatch_size or 1))
  _validation.check("chunk_size", chunk_size, _validation.COUNT)
  _validation.require(
    not chunk_size % shards,
    "chunk_size",
    f"a multiple of the {shards} devices, which divide it (see devices)",
    chunk_size,
  )
  if microbatch_size is not None:
    of = "" if shards == 1 else f" over {shards} devices"
    _validation.require(
      not chunk_size // shards % microbatch_size,
      "microbatch_size",
      f"a divisor of chunk_size={chunk_size}{of}",
      microbatch_size,
    )
  return chunk_size

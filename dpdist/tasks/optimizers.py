"""Makes the optimizer of a config: any of optax's, with a schedule."""

import ml_collections
import optax

_SCHEDULES = ("constant", "cosine", "linear")


def make(
  config: ml_collections.ConfigDict, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Makes the optimizer that is applied to the noisy mean gradient.

  Whatever it computes is post-processing of a released value and costs no
  privacy.

  Args:
    config: `config.optimizer`: name, learning_rate, schedule, warmup_steps and
      options, which are the optimizer's own arguments.
    num_steps: steps of the whole run, at which the schedule ends.

  Returns:
    The optimizer, and its learning rate as a function of the step.

  Raises:
    ValueError: with the setting's name, its value and what would be right.
  """
  make_optimizer = getattr(optax, config.name, None)
  if not callable(make_optimizer) or config.name.startswith("_"):
    raise ValueError(
      "optimizer.name must be an optax optimizer such as sgd, adam or lamb,"
      f" got {config.name!r}"
    )
  schedule = _schedule(config, num_steps)
  try:
    optimizer = make_optimizer(
      learning_rate=schedule, **config.options.to_dict()
    )
  except TypeError as error:
    raise ValueError(
      f"optimizer.options must be arguments of optax.{config.name}, got"
      f" {config.options.to_dict()}: {error}"
    ) from error
  return optimizer, schedule


def _schedule(
  config: ml_collections.ConfigDict, num_steps: int
) -> optax.Schedule:
  peak, warmup = config.learning_rate, config.warmup_steps
  if not peak > 0:
    raise ValueError(f"optimizer.learning_rate must be above 0, got {peak}")
  if not 0 <= warmup < num_steps:
    raise ValueError(
      "optimizer.warmup_steps must be at least 0 and below the"
      f" {num_steps} steps of the run, got {warmup}"
    )
  remaining = num_steps - warmup
  if config.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif config.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, remaining)
  elif config.schedule == "linear":
    after = optax.linear_schedule(peak, 0.0, remaining)
  else:
    raise ValueError(
      f"optimizer.schedule must be one of {_SCHEDULES}, got {config.schedule!r}"
    )
  if not warmup:
    return after
  # The rate of the first update is not 0: that step would spend for nothing.
  ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([ramp, after], [warmup])

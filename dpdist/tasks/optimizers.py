"""Makes the optimizer of a config: any of optax's, with a schedule."""

from collections.abc import Callable
import inspect
from typing import Any, cast

import jax
import ml_collections
import optax

from dpdist import _validation
from dpdist import errors
from dpdist import registry

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
  make_optimizer = _maker(config.name)
  schedule = _schedule(config, num_steps)
  try:
    optimizer = make_optimizer(
      learning_rate=schedule, **config.options.to_dict()
    )
  except TypeError as error:
    raise errors.ArgumentError(
      f"optimizer.options must be arguments of {config.name}, got"
      f" {config.options.to_dict()}: {error}"
    ) from error
  check(optimizer, f"what optimizer.name={config.name!r} returns")
  return optimizer, schedule


def is_registered(name: str) -> bool:
  """Returns whether a name is that of an added optimizer, not one of optax."""
  return ":" in name or registry.is_known("optimizer", name)


def _maker(name: str) -> Callable[..., optax.GradientTransformation]:
  """Returns what a name finds: a function of a learning rate and options."""
  if is_registered(name):
    made: Callable[..., optax.GradientTransformation] = registry.resolve(
      "optimizer", name, setting="optimizer.name"
    )
    return made
  maker: Any = getattr(optax, name, None)
  if not _takes_learning_rate(maker):
    known = [x for x in dir(optax) if _takes_learning_rate(getattr(optax, x))]
    known += registry.names("optimizer")
    raise errors.ArgumentError(
      "optimizer.name must be an optax optimizer such as sgd, adam or lamb, or"
      " package.module:function, got"
      f" {name!r}{_validation.suggestion(name, known)}"
    )
  return cast("Callable[..., optax.GradientTransformation]", maker)


def _takes_learning_rate(maker: Any) -> bool:
  if not callable(maker) or isinstance(maker, type):
    return False
  try:
    return "learning_rate" in inspect.signature(maker).parameters
  except (TypeError, ValueError):
    return False


def try_out(optimizer: optax.GradientTransformation, params: Any) -> None:
  """Raises ValueError unless an optimizer can update such parameters.

  Shapes are enough; nothing is computed.
  """
  what = (
    "optimizer must be able to update the model's parameters, got one whose"
  )
  try:
    state = jax.eval_shape(optimizer.init, params)
  except Exception as error:
    # A user's function may raise anything.
    raise errors.ArgumentError(
      f"{what} init raises {errors.in_a_line(error)}"
    ) from error
  try:
    updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    is_alike = shapes(updates) == shapes(params)
  except Exception as error:
    raise errors.ArgumentError(
      f"{what} update raises {errors.in_a_line(error)}"
    ) from error
  if not is_alike:
    raise errors.ArgumentError(
      f"{what} update returns {shapes(updates)} for parameters {shapes(params)}"
    )


def check(optimizer: Any, name: str) -> None:
  """Raises ValueError unless a thing, which is called `name`, is optax's."""
  if not (
    callable(getattr(optimizer, "init", None))
    and callable(getattr(optimizer, "update", None))
  ):
    raise errors.ArgumentError(
      f"{name} must be an optax.GradientTransformation, as optax.sgd(0.1)"
      f" returns, got {_validation.described(optimizer)}"
    )


def _schedule(
  config: ml_collections.ConfigDict, num_steps: int
) -> optax.Schedule:
  peak, warmup = config.learning_rate, config.warmup_steps
  _validation.check("optimizer.learning_rate", peak, _validation.POSITIVE)
  _validation.check(
    "optimizer.schedule", config.schedule, _validation.one_of(_SCHEDULES)
  )
  _validation.require(
    0 <= warmup < num_steps,
    "optimizer.warmup_steps",
    f"at least 0 and below the {num_steps} steps of the run",
    warmup,
  )
  remaining = num_steps - warmup
  if config.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif config.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, remaining)
  else:
    after = optax.linear_schedule(peak, 0.0, remaining)
  if not warmup:
    return after
  # The rate of the first update is not 0: that step would spend for nothing.
  ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([ramp, after], [warmup])

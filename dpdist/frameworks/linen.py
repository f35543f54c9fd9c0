"""What is known of Flax Linen's modules: functions, findings, batch norms."""

from collections.abc import Callable, Iterator
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dpdist import errors
from dpdist.frameworks import model as model_lib
from dpdist.frameworks import model_check
from dpdist.frameworks import norms

PyTree = Any

_NORM = "flax.linen.GroupNorm or LayerNorm"
# What a call says to train, and what it says not to.
_TRAINS, _IS_FIXED = ("train", "training", "is_training"), ("deterministic",)


def of(
  make: Any, *, is_made: bool, fix: bool, has_batch_axis: bool
) -> model_lib.Model:
  """Returns the functions of a module, or of what makes one of a key."""
  module: nn.Module = make(jax.random.key(0)) if is_made else make
  changes: list[str] = []
  if fix:
    module, changes = replaced(module, has_batch_axis=has_batch_axis)
  trains = model_lib.calls(type(module).__call__, *_TRAINS)
  is_fixed = model_lib.calls(type(module).__call__, *_IS_FIXED)

  def says(*, is_trained: bool) -> dict[str, Any]:
    return dict.fromkeys(trains, is_trained) | dict.fromkeys(
      is_fixed, not is_trained
    )

  def apply(params: PyTree, inputs: Any, rng: jax.Array | None) -> Any:
    variables, more = {"params": params}, says(is_trained=rng is not None)
    if rng is None:
      return module.apply(variables, inputs, **more)
    return module.apply(variables, inputs, rngs={"dropout": rng}, **more)

  def init(key: jax.Array, inputs: Any) -> PyTree:
    variables = module.init(key, inputs, **says(is_trained=False))
    return variables.get("params", {})  # A module may have none.

  def found(inputs: Any) -> list[model_check.Finding]:
    more = says(is_trained=True)
    if not isinstance(module, nn.Module):
      return []
    return [*findings(module, (inputs,), is_alone=False, more=more)]

  return model_lib.Model(
    name=type(module).__name__,
    init=init,
    apply=apply,
    findings=found,
    merge=lambda params: module.bind({"params": params}),
    changes=tuple(changes),
    partitioning=getattr(module, "partitioning", ()),
    takes_images=getattr(module, "takes_images", False),
  )


def findings(
  model: nn.Module,
  inputs: tuple[Any, ...],
  *,
  is_alone: bool,
  more: dict[str, Any] | None = None,
) -> Iterator[model_check.Finding]:
  """Yields what is unsafe in a module; see `dpdist.check_model`."""
  del is_alone
  if not inputs:
    raise errors.ArgumentError(
      "inputs must be what the Linen module is called with for one example,"
      " got none"
    )
  batch_norms: dict[str, None] = {}

  def listen(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, nn.BatchNorm):
      batch_norms["/".join(context.module.path)] = None
    return call(*args, **kwargs)

  streams = ("params", "dropout")
  keys = {name: jax.random.key(i) for i, name in enumerate(streams)}
  init = functools.partial(model.init, **(more or {}))
  with nn.intercept_methods(listen):
    variables = jax.eval_shape(init, keys, *inputs)
  for path in batch_norms:
    yield model_check.batch_norm("BatchNorm", path, _NORM)
  # Collections that any call may change; sown intermediates are dropped.
  for name in sorted({*variables} - {"params", "batch_stats", "intermediates"}):
    yield model_check.Finding(
      f"a mutable collection {name!r}",
      "model",
      model_check.KEEPS,
      "constants that loss_fn closes over, or dpdist.with_state, which checks"
      " that the state depends on no example",
    )
  if "batch_stats" in variables and not batch_norms:
    yield model_check.batch_norm("the collection 'batch_stats'", "model", _NORM)


class GroupNormForBatchNorm(nn.Module):
  """A group norm that takes the arguments of a batch norm.

  The numbers of the batch, such as its momentum, are left unused.
  """

  has_batch_axis: bool = True
  use_running_average: bool | None = None
  axis: int = -1
  momentum: float = 0.99
  epsilon: float = 1e-5
  dtype: Any = None
  param_dtype: Any = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: Callable[..., Any] = nn.initializers.zeros
  scale_init: Callable[..., Any] = nn.initializers.ones
  axis_name: str | None = None
  axis_index_groups: Any = None
  use_fast_variance: bool = True

  @nn.compact
  def __call__(
    self, x: jax.Array, use_running_average: bool | None = None, **more: Any
  ) -> jax.Array:
    """Normalises one example; see `flax.linen.GroupNorm`."""
    del use_running_average, more
    if self.axis not in (-1, x.ndim - 1):
      raise errors.ArgumentError(
        "axis of a batch norm that is to be replaced must be the last, got"
        f" {self.axis}"
      )
    norm = nn.GroupNorm(
      num_groups=norms.num_groups(x.shape[-1]),
      epsilon=self.epsilon,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      use_bias=self.use_bias,
      use_scale=self.use_scale,
      bias_init=self.bias_init,
      scale_init=self.scale_init,
    )
    found: jax.Array = norm(x) if self.has_batch_axis else norm(x[None])[0]
    return found


def replaced(
  module: nn.Module, *, has_batch_axis: bool = True
) -> tuple[nn.Module, list[str]]:
  """Replaces batch norm where an attribute holds its class.

  Returns the module and what was done. A batch norm that a method names is in
  no attribute, and stays.
  """
  changes: list[str] = []
  given: dict[str, Any] = {}
  for name in module.__dataclass_fields__:
    value: Any = getattr(module, name, None)
    partial = value if isinstance(value, functools.partial) else None
    if (value if partial is None else partial.func) is nn.BatchNorm:
      arguments = () if partial is None else partial.args
      keywords = {} if partial is None else partial.keywords
      norm = functools.partial(
        GroupNormForBatchNorm, has_batch_axis=has_batch_axis
      )
      given[name] = functools.partial(norm, *arguments, **keywords)
      changes.append(norms.sentence(f"the attribute {name!r}", ""))
  return (module.clone(**given) if given else module), changes

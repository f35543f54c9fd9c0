"""Finds what in a model is unsafe to train privately, before a step is spent.

    for finding in dpdist.check_model(
      model, loss_fn=loss_fn, params=params, batch=batch
    ):
      print(finding)

The loss is checked as a traced program, whatever framework it was written in.
The model is checked module by module, if its framework is known: Flax Linen,
Flax NNX, Equinox or Keras. None of them is imported for it.

An empty list is no proof. Only the clipping bounds an example's influence, as
it takes one example at a time. This check finds what would raise an error
there, or train badly without one.
"""

from collections.abc import Callable, Iterator
import dataclasses
import sys
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from dpdist.clipping.trace import dependence

PyTree = Any

_GROUP_NORM = {
  "flax.linen": "flax.linen.GroupNorm or LayerNorm",
  "flax.nnx": "flax.nnx.GroupNorm or LayerNorm",
  "equinox": "equinox.nn.GroupNorm or LayerNorm",
  "keras": (
    "keras.layers.GroupNormalization or LayerNormalization, or freeze the layer"
    " (trainable=False)"
  ),
}
_MIXES = (
  "it normalises an example by statistics of the batch, so that a gradient"
  " depends on other examples, and keeps statistics that no noise covers"
)
_KEEPS = "what it keeps of the examples would be released without noise"
_DRAWS = ("random_bits", "threefry2x32", "rng_bit_generator")


@dataclasses.dataclass(frozen=True)
class Finding:
  """One unsafe part of a model or loss.

  Attributes:
    what: what was found.
    where: its place in the model, its parameters or its loss.
    why: why it matters.
    instead: what would be right.
  """

  what: str
  where: str
  why: str
  instead: str

  def __str__(self) -> str:
    return f"{self.where}: {self.what}: {self.why}; instead: {self.instead}"


def check_model(
  model: Any = None,
  *inputs: Any,
  loss_fn: Callable[..., Any] | None = None,
  params: PyTree = None,
  batch: PyTree = None,
  rng: jax.Array | None = None,
  has_aux: bool = False,
) -> list[Finding]:
  """Lists what is unsafe in a model, in its loss, or in both.

  Args:
    model: a module of Flax Linen, Flax NNX, Equinox or Keras. None: only the
      loss is checked.
    *inputs: arguments of a Linen module for one example, since it can only be
      checked in a call; shapes are enough. Other modules need none.
    loss_fn: (params, example[, rng]) -> loss, for `dpdist.clipped_grad`. None:
      only the model is checked.
    params: with loss_fn, the initial parameters.
    batch: with loss_fn, some examples; only their shapes matter.
    rng: with loss_fn, a PRNG key if it takes one.
    has_aux: whether loss_fn returns (loss, aux).

  Returns:
    Findings; none if nothing was found.

  Raises:
    ValueError: there is nothing to check.
  """
  if model is None and loss_fn is None:
    raise ValueError("model or loss_fn must be given, got neither")
  found: list[Finding] = []
  if model is not None:
    found += _of_module(model, inputs, is_alone=loss_fn is None)
  if loss_fn is not None:
    found += of_params(params)
    found += _of_loss(loss_fn, params, batch, rng, has_aux)
  return list(dict.fromkeys(found))


def of_params(params: PyTree) -> Iterator[Finding]:
  """Yields findings on values: what is no number, or not finite."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    where = f"params{jax.tree_util.keystr(path)}"
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      yield Finding(
        f"parameters of dtype {dtype}",
        where,
        "nothing can be differentiated by them",
        "let loss_fn close over them, or pass them as frozen",
      )
    elif not isinstance(leaf, jax.ShapeDtypeStruct) and not np.all(
      np.isfinite(np.asarray(leaf, np.float64))
    ):
      yield Finding(
        "initial values that are not finite",
        where,
        "every gradient would be non-finite, and contribute nothing",
        "initialise with finite numbers",
      )


def _of_loss(
  loss_fn: Callable[..., Any],
  params: PyTree,
  batch: PyTree,
  rng: jax.Array | None,
  has_aux: bool,
) -> Iterator[Finding]:
  shape = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  example = jax.tree.map(shape, jax.tree.map(jnp.asarray, batch))
  arguments = (params, example) if rng is None else (params, example, rng)
  try:
    closed, out = jax.make_jaxpr(loss_fn, return_shape=True)(*arguments)
  except NameError as error:
    if "axis name" not in str(error):
      raise
    yield Finding(
      f"a named axis over examples ({error})", "loss_fn", _MIXES, "group norm"
    )
    return
  except Exception as error:
    # Flax's and Equinox's own errors; each framework has another class.
    if "trace" not in str(error).lower():
      raise
    yield Finding(
      f"state that changes inside the loss ({str(error).splitlines()[0]})",
      "loss_fn",
      _KEEPS,
      "a loss that gets parameters, example and rng as arguments, such as"
      " per_example_loss of dpdist.frontends",
    )
    return
  loss = out[0] if has_aux else out
  if getattr(loss, "shape", None) != () or not jnp.issubdtype(
    loss.dtype, jnp.floating
  ):
    yield Finding(
      "no single floating number",
      "loss_fn",
      "a loss is one number for one example",
      "take the mean over what belongs to the example",
    )
    return
  yield from _of_program(closed.jaxpr, params, rng)


def _of_program(
  jaxpr: Any, params: PyTree, rng: jax.Array | None
) -> Iterator[Finding]:
  num_inputs = len(jaxpr.invars)
  paths = jax.tree_util.tree_leaves_with_path(params)
  for i, (path, _) in enumerate(paths):
    if not dependence.dependent(jaxpr, [j == i for j in range(num_inputs)])[0]:
      yield Finding(
        "parameters that no example touches",
        f"params{jax.tree_util.keystr(path)}",
        "their gradient is always 0, and each step adds noise to them",
        "leave them out, or pass them as frozen",
      )
  first = num_inputs if rng is None else num_inputs - 1
  marked = [i >= first for i in range(num_inputs)]
  if _draws(jaxpr) and not (
    rng is not None and dependence.dependent(jaxpr, marked)[0]
  ):
    yield Finding(
      "random numbers that do not come from the loss's rng",
      "loss_fn",
      "they are the same for every example and at every step, which is right"
      " for fixed features and wrong for dropout",
      "loss_fn(params, example, rng), with all randomness from rng",
    )


def _draws(jaxpr: Any) -> bool:
  return any(
    eqn.primitive.name in _DRAWS
    or any(_draws(inner) for inner in core.jaxprs_in_params(eqn.params))
    for eqn in jaxpr.eqns
  )


def _of_module(
  model: Any, inputs: tuple[Any, ...], *, is_alone: bool
) -> list[Finding]:
  linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
  keras, equinox = sys.modules.get("keras"), sys.modules.get("equinox")
  if linen is not None and isinstance(model, linen.Module):
    return list(_of_linen(linen, model, inputs))
  if nnx is not None and isinstance(model, nnx.Module):
    return list(_of_nnx(nnx, model, is_alone))
  if keras is not None and isinstance(model, keras.Layer):
    return list(_of_keras(keras, model))
  if equinox is not None and isinstance(model, equinox.Module):
    return list(_of_equinox(equinox, model, "model"))
  raise ValueError(
    "model must be a module of Flax Linen, Flax NNX, Equinox or Keras, got a"
    f" {type(model).__name__}: pass a plain function as loss_fn"
  )


def _batch_norm(framework: str, name: str, where: str) -> Finding:
  return Finding(name, where, _MIXES, _GROUP_NORM[framework])


def _of_linen(
  linen: Any, model: Any, inputs: tuple[Any, ...]
) -> Iterator[Finding]:
  if not inputs:
    raise ValueError(
      "inputs must be what the Linen module is called with for one example,"
      " got none"
    )
  batch_norms: dict[str, None] = {}

  def listen(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, linen.BatchNorm):
      batch_norms["/".join(context.module.path)] = None
    return call(*args, **kwargs)

  streams = ("params", "dropout")
  keys = {name: jax.random.key(i) for i, name in enumerate(streams)}
  with linen.intercept_methods(listen):
    variables = jax.eval_shape(model.init, keys, *inputs)
  for path in batch_norms:
    yield _batch_norm("flax.linen", "BatchNorm", path)
  # Collections that any call may change; sown intermediates are dropped.
  for name in sorted({*variables} - {"params", "batch_stats", "intermediates"}):
    yield Finding(
      f"a mutable collection {name!r}",
      "model",
      _KEEPS,
      "constants that loss_fn closes over, or dpdist.with_state, which checks"
      " that the state depends on no example",
    )
  if "batch_stats" in variables and not batch_norms:
    yield _batch_norm("flax.linen", "the collection 'batch_stats'", "model")


def _of_nnx(nnx: Any, model: Any, is_alone: bool) -> Iterator[Finding]:
  inside: list[str] = []
  for path, module in nnx.iter_modules(model):
    where = "/".join(map(str, path))
    if isinstance(module, nnx.BatchNorm):
      inside.append(where)
      yield _batch_norm("flax.nnx", "BatchNorm", where)
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    where = "/".join(map(str, path))
    if isinstance(variable, nnx.Param) or any(
      where.startswith(f"{name}/") for name in inside
    ):
      continue
    kind = type(variable).__name__
    if not isinstance(variable, nnx.RngState):
      yield Finding(
        f"state that is no nnx.Param ({kind})", where, _KEEPS, "nnx.Param"
      )
    elif is_alone:
      yield Finding(
        f"stochastic state ({kind})",
        where,
        "a loss of one example cannot advance it, and all examples would share"
        " its random numbers",
        "dpdist.frontends.nnx.per_example_loss, which gives every example its"
        " own, and check that loss_fn",
      )


def _of_equinox(equinox: Any, model: Any, prefix: str) -> Iterator[Finding]:
  kinds = (equinox.nn.StatefulLayer, equinox.nn.StateIndex)

  def is_layer(x: Any) -> bool:
    # A Sequential is stateful only if one of its layers is.
    is_container = isinstance(x, equinox.nn.Sequential)
    return isinstance(x, kinds) and not is_container

  leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_layer)
  for path, leaf in leaves:
    where = prefix + jax.tree_util.keystr(path)
    if isinstance(leaf, equinox.nn.BatchNorm):
      yield _batch_norm("equinox", "BatchNorm", where)
    elif is_layer(leaf):
      yield Finding(
        f"a stateful layer ({type(leaf).__name__})",
        where,
        _KEEPS,
        "a layer without equinox.nn.State",
      )


def _of_keras(keras: Any, model: Any) -> Iterator[Finding]:
  for layer in model._flatten_layers():
    where, layers = layer.path or layer.name, keras.layers
    if isinstance(layer, layers.BatchNormalization) and layer.trainable:
      yield _batch_norm("keras", "BatchNormalization", where)
    elif isinstance(layer, layers.SpectralNormalization) and layer.trainable:
      yield Finding(
        "SpectralNormalization",
        where,
        "it changes state at each call",
        "a kernel constraint such as keras.constraints.UnitNorm",
      )
    elif isinstance(layer, layers.Normalization) and layer.input_mean is None:
      yield Finding(
        "Normalization by adapt()",
        where,
        "mean and variance that were computed from private examples would be"
        " released without noise",
        "Normalization(mean=..., variance=...) with public numbers, or"
        " keras.layers.Rescaling",
      )
  yield from of_params({v.path: v.value for v in model.trainable_variables})

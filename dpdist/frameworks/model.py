"""Makes two plain functions, init and apply, of a model of any framework.

    model = model.of(lambda rngs: MLP(8, rngs=rngs))
    params = model.init(key, inputs)
    outputs = model.apply(params, inputs, rng)

Inputs and outputs are those of one example, without a batch axis. Parameters
are nested dicts of arrays, whatever the framework: so they have the same paths
in rules of partitioning, checkpoints and exports.

Guarantees:
  * No variable of a model but its parameters outlives a call: a model with
    other state, such as batch norm's, is refused.
  * With an rng, all random numbers of a call come from it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import importlib
import inspect
import sys
from typing import Any

import jax

from dpdist import _validation
from dpdist import errors
from dpdist.distributed import mesh
from dpdist.frameworks import model_check

PyTree = Any

# By framework: its class of modules, and what has `of`, `findings`, `replaced`.
_FRAMEWORKS = (
  ("flax.linen", "Module", "dpdist.frameworks.linen"),
  ("flax.nnx", "Module", "dpdist.frameworks.nnx"),
  ("equinox", "Module", "dpdist.frameworks.equinox"),
)


@dataclasses.dataclass(frozen=True)
class Model:
  """A model as functions of one example's inputs.

  Attributes:
    name: of its class, for messages.
    init: (key, inputs) -> parameters.
    apply: (params, inputs, rng) -> outputs. With rng None the model is
      evaluated: nothing is dropped.
    findings: inputs -> what is unsafe in the model; only their shapes matter.
    merge: params -> the module with these parameters, if there is one.
    changes: what was replaced in it, a sentence each.
    partitioning: rules of the mesh axis `model`.
    takes_images: whether inputs must be (height, width, channels).
  """

  name: str
  init: Callable[[jax.Array, Any], PyTree]
  apply: Callable[[PyTree, Any, jax.Array | None], Any]
  findings: Callable[[Any], list[model_check.Finding]] = lambda inputs: []
  merge: Callable[[PyTree], Any] = lambda params: params
  changes: tuple[str, ...] = ()
  partitioning: mesh.Rules = ()
  takes_images: bool = False


def of(model: Any, *, fix: bool = False, has_batch_axis: bool = False) -> Model:
  """Returns the functions of a model.

  Args:
    model: a Flax Linen module; an NNX module or what makes one, of nothing or
      of rngs; an Equinox module or what makes one, of nothing or of a key; or
      (init, apply): init(key, inputs) -> params and apply(params, inputs) ->
      outputs, whose argument `rng`, if it has one, gets a key, and None when
      the model is evaluated.
    fix: whether to replace batch norm by group norm where that can be done.
    has_batch_axis: whether the model expects a batch axis; it then gets a batch
      of one.

  Raises:
    ValueError: it is none of these.
  """
  if isinstance(model, tuple):
    found = _of_pair(model)
  else:
    make, framework = _maker(model)
    library: Any = importlib.import_module(framework)
    found = library.of(
      make,
      is_made=make is not model,
      fix=fix,
      has_batch_axis=has_batch_axis,
    )
  return _without_batch_axis(found) if has_batch_axis else found


def framework_of(module: Any) -> str:
  """Returns the name of our module for a module's framework; "" if unknown."""
  for framework, kind, ours in _FRAMEWORKS:
    # A module's framework has been imported by now.
    if framework in sys.modules and isinstance(
      module, getattr(sys.modules[framework], kind)
    ):
      return ours
  return ""


def calls(function: Callable[..., Any], *names: str) -> list[str]:
  """Returns those of the names that are named arguments of a function."""
  try:
    parameters = inspect.signature(function).parameters
  except (TypeError, ValueError):
    return []
  return [name for name in names if name in parameters]


def positional(function: Callable[..., Any]) -> list[str]:
  """Returns the names of a function's positional arguments."""
  return [
    p.name
    for p in inspect.signature(function).parameters.values()
    if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
  ]


def nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
  """Returns nested dicts of leaves by path."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    inner = tree
    for name in path[:-1]:
      inner = inner.setdefault(name, {})
    inner[path[-1]] = leaf
  return tree


def at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  """Returns the leaf at a path of nested dicts.

  Raises:
    ValueError: there is none.
  """
  inner: Any = tree
  for name in path:
    if not isinstance(inner, Mapping) or name not in inner:
      raise errors.ArgumentError(
        f"params must have a leaf for each parameter of the model, got none at"
        f" {'/'.join(path)!r}"
      )
    inner = inner[name]
  return inner


def _maker(model: Any) -> tuple[Any, str]:
  """Returns a module, or a function from a key to one; and its framework."""
  framework = framework_of(model)
  if framework:
    return model, framework
  if _is_class_of_linen(model):
    raise _no_model(model)
  if hasattr(model, "apply"):  # It is called as a module of Linen.
    return model, "dpdist.frameworks.linen"
  if not callable(model):
    raise _no_model(model)
  make = _of_key(model)
  kinds: list[str] = []

  def look() -> None:
    made = make(jax.random.key(0))
    kinds.append(framework_of(made) or type(made).__name__)

  try:
    jax.eval_shape(look)
  except errors.ArgumentError:
    raise
  except Exception as error:
    # A user's function may raise anything.
    raise errors.ArgumentError(
      f"{_WANTED}, got {_name_of(model)}, which was taken for what makes a"
      f" module, and raises {errors.in_a_line(error)}"
    ) from error
  if kinds[0] not in {ours for *_, ours in _FRAMEWORKS}:
    raise errors.ArgumentError(
      f"{_WANTED}, got {_name_of(model)}, which was taken for what makes a"
      f" module, and returns a {kinds[0]}"
    )
  return make, kinds[0]


def _of_key(maker: Callable[..., Any]) -> Callable[[jax.Array], Any]:
  """Returns a maker of modules as a function of a key."""
  parameters = inspect.signature(_init_of(maker)).parameters.values()
  needed = [
    p
    for p in parameters
    if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
  ]
  if not needed:
    return lambda key: maker()
  if len(needed) > 1:
    names = ", ".join(p.name for p in needed)
    if isinstance(maker, type):
      call = f"{maker.__name__}({', '.join(f'{p.name}=...' for p in needed)})"
      raise errors.ArgumentError(
        f"{_WANTED}, got the class {maker.__name__}, which needs {names}: give"
        f" what makes one, as lambda {needed[-1].name}: {call}"
      )
    raise errors.ArgumentError(
      f"{_WANTED}, got {_name_of(maker)} of {names}: a function of parameters"
      " and inputs needs an init beside it, as (init, apply)"
    )
  (argument,) = needed

  def make(key: jax.Array) -> Any:
    value: Any = key
    if "rngs" in argument.name:
      # A module of NNX has imported it.
      value = importlib.import_module("flax.nnx").Rngs(key)
    if argument.kind is argument.KEYWORD_ONLY:
      return maker(**{argument.name: value})
    return maker(value)

  return make


def _init_of(maker: Callable[..., Any]) -> Callable[..., Any]:
  """Returns what says a maker's arguments: of a class, its `__init__`.

  A class of NNX or Equinox has a metaclass, whose call takes anything.
  """
  if isinstance(maker, functools.partial):
    inner = _init_of(maker.func)
    return functools.partial(inner, *maker.args, **maker.keywords)
  if isinstance(maker, type):
    return functools.partial(getattr(maker, "__init__"), None)  # noqa: B009
  return maker


def _of_pair(pair: tuple[Any, ...]) -> Model:
  if len(pair) != 2 or not all(map(callable, pair)):
    raise _no_model(pair)
  init, apply = pair
  takes_rng = bool(calls(apply, "rng"))

  def applied(params: PyTree, inputs: Any, rng: jax.Array | None) -> Any:
    if takes_rng:
      return apply(params, inputs, rng=rng)
    return apply(params, inputs)

  name = getattr(apply, "__name__", "apply")
  if name == "<lambda>":
    name = "(init, apply)"
  return Model(name=name, init=init, apply=applied)


def _without_batch_axis(model: Model) -> Model:
  def batch(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
    return x[None]

  one = lambda inputs: jax.tree.map(batch, inputs)

  def apply(params: PyTree, inputs: Any, rng: jax.Array | None) -> Any:
    outputs = model.apply(params, one(inputs), rng)
    return jax.tree.map(lambda x: x[0], outputs)

  return dataclasses.replace(
    model,
    init=lambda key, inputs: model.init(key, one(inputs)),
    apply=apply,
    findings=lambda inputs: model.findings(one(inputs)),
  )


_WANTED = (
  "model must be a module of Flax Linen, Flax NNX or Equinox, a function that"
  " makes one of nothing, of rngs or of a key, or (init, apply)"
)


def _no_model(model: Any) -> errors.ArgumentError:
  return errors.ArgumentError(f"{_WANTED}, got {_validation.described(model)}")


def _name_of(function: Any) -> str:
  if isinstance(function, functools.partial):
    function = function.func
  name = getattr(function, "__name__", type(function).__name__)
  return "a lambda" if name == "<lambda>" else f"the function {name}"


def _is_class_of_linen(model: Any) -> bool:
  linen = sys.modules.get("flax.linen")
  return (
    linen is not None
    and isinstance(model, type)
    and issubclass(model, linen.Module)
  )

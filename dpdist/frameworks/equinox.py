"""What is known of Equinox's modules: functions, findings, batch norms."""

from collections.abc import Iterator
import functools
from typing import Any

import equinox as eqx
import jax

from dpdist.frameworks import model as model_lib
from dpdist.frameworks import model_check
from dpdist.frameworks import norms

PyTree = Any

_STATEFUL = (eqx.nn.StatefulLayer, eqx.nn.StateIndex)


class _Functions:
  """The functions of a module, or of what makes one of a key."""

  def __init__(self, make: Any, *, is_made: bool, fix: bool):
    self._make, self._is_made, self._fix = make, is_made, fix
    self.changes: list[str] = []

  def module(self, key: jax.Array) -> Any:
    """Returns the module, with what was to be replaced replaced."""
    found = self._make(key) if self._is_made else self._make
    if self._fix:
      found, self.changes = replaced(found)
    return found

  @functools.cached_property
  def shapes(self) -> Any:
    """Returns the module with shapes for arrays, where it has to be made."""
    if not self._is_made:
      return self.module(jax.random.key(0))
    return eqx.filter_eval_shape(self.module, jax.random.key(0))

  @functools.cached_property
  def _parts(self) -> tuple[PyTree, PyTree]:
    """Returns parameters, or their shapes, and all else, made of a fixed key.

    Arrays of integers are no parameters; a maker's would depend on its key.
    """
    model_check.refuse_unsafe(findings(self.shapes))
    params, static = eqx.partition(self.shapes, _is_param)
    if any(map(_is_array, jax.tree.leaves(static))) and self._is_made:
      # Compiled, so that only what is kept is computed, outside of any trace.
      with jax.ensure_compile_time_eval():
        constants = eqx.filter_jit(
          lambda key: eqx.partition(self.module(key), _is_param)[1]
        )(jax.random.key(0))
      static = constants
    return params, static

  def init(self, key: jax.Array, inputs: Any) -> PyTree:
    """Returns the parameters, as nested dicts."""
    del inputs
    assert self._parts
    params = eqx.filter(self.module(key), eqx.is_inexact_array)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return model_lib.nested({_names(path): leaf for path, leaf in leaves})

  def merge(self, params: PyTree) -> Any:
    """Returns a module with these parameters."""
    template, static = self._parts
    found = jax.tree_util.tree_map_with_path(
      lambda path, leaf: model_lib.at(params, _names(path)), template
    )
    return eqx.combine(found, static)

  def apply(self, params: PyTree, inputs: Any, rng: jax.Array | None) -> Any:
    """Returns the outputs for one example."""
    module = self.merge(params)
    if rng is None:
      module = eqx.nn.inference_mode(module)
    given: dict[str, Any] = {}
    if model_lib.calls(module.__call__, "key"):
      given["key"] = rng
    # A module that hands on the state of batch norms that were replaced.
    has_state = model_lib.calls(module.__call__, "state") and not isinstance(
      module, eqx.nn.Sequential | eqx.nn.GroupNorm | eqx.nn.LayerNorm
    )
    if has_state:
      outputs, _ = module(inputs, state=eqx.nn.State(module), **given)
      return outputs
    return module(inputs, **given)


def of(
  make: Any, *, is_made: bool, fix: bool, has_batch_axis: bool
) -> model_lib.Model:
  """Returns the functions of a module, or of what makes one of a key."""
  del has_batch_axis  # No layer of Equinox has one.
  functions = _Functions(make, is_made=is_made, fix=fix)
  shapes = functions.shapes
  return model_lib.Model(
    name=type(shapes).__name__,
    init=functions.init,
    apply=functions.apply,
    findings=lambda inputs: [*findings(shapes)],
    merge=functions.merge,
    changes=tuple(functions.changes),
    partitioning=getattr(shapes, "partitioning", ()),
    takes_images=getattr(shapes, "takes_images", False),
  )


def findings(
  model: eqx.Module, inputs: tuple[Any, ...] = (), *, is_alone: bool = True
) -> Iterator[model_check.Finding]:
  """Yields what is unsafe in a module; see `dpdist.check_model`."""
  del inputs, is_alone
  leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_stateful)
  for path, leaf in leaves:
    where = "model" + jax.tree_util.keystr(path)
    if isinstance(leaf, eqx.nn.BatchNorm):
      yield model_check.batch_norm(
        "BatchNorm", where, "equinox.nn.GroupNorm or LayerNorm"
      )
    elif _is_stateful(leaf):
      yield model_check.Finding(
        f"a stateful layer ({type(leaf).__name__})",
        where,
        model_check.KEEPS,
        "a layer without equinox.nn.State",
      )


def replaced(model: Any) -> tuple[Any, list[str]]:
  """Returns the module with group norms for batch norms, and what was done."""
  changes: list[str] = []

  def new(path: Any, leaf: Any) -> Any:
    if not isinstance(leaf, eqx.nn.BatchNorm):
      return leaf
    groups = norms.num_groups(leaf.input_size)
    where = "model" + jax.tree_util.keystr(path)
    changes.append(norms.sentence(where, str(groups)))
    return eqx.nn.GroupNorm(
      groups,
      leaf.input_size,
      eps=leaf.eps,
      channelwise_affine=leaf.channelwise_affine,
    )

  is_norm = lambda x: isinstance(x, eqx.nn.BatchNorm)
  return (
    jax.tree_util.tree_map_with_path(new, model, is_leaf=is_norm),
    changes,
  )


def _is_stateful(x: Any) -> bool:
  # A Sequential is stateful only if one of its layers is.
  return isinstance(x, _STATEFUL) and not isinstance(x, eqx.nn.Sequential)


def _is_array(x: Any) -> bool:
  return isinstance(x, jax.ShapeDtypeStruct) or eqx.is_array(x)


def _is_param(x: Any) -> bool:
  return _is_array(x) and jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)

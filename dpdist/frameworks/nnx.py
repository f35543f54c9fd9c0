"""What is known of Flax NNX's modules: functions, findings, batch norms."""

from collections.abc import Iterator
import functools
from typing import Any

from flax import nnx
import jax

from dpdist.frameworks import model as model_lib
from dpdist.frameworks import model_check
from dpdist.frameworks import norms

PyTree = Any

_NORM = "flax.nnx.GroupNorm or LayerNorm"


class _Functions:
  """The functions of a module, or of what makes one of a key.

  Nothing is made before the first call, so that what is unsafe in a module is
  first said by `findings`.
  """

  def __init__(
    self, make: Any, *, is_made: bool, fix: bool, has_batch_axis: bool
  ):
    self._make, self._is_made, self._fix = make, is_made, fix
    self._has_batch_axis = has_batch_axis
    self.changes: list[str] = []

  def module(self, key: jax.Array) -> nnx.Module:
    """Returns the module, with what was to be replaced replaced."""
    found: nnx.Module = self._make(key) if self._is_made else self._make
    if self._fix:
      found, self.changes = replaced(found, has_batch_axis=self._has_batch_axis)
    return found

  @functools.cached_property
  def shapes(self) -> nnx.Module:
    """Returns the module with shapes for arrays, where it has to be made."""
    if not self._is_made:
      return self.module(jax.random.key(0))
    found: nnx.Module = nnx.eval_shape(lambda: self.module(jax.random.key(0)))
    return found

  @functools.cached_property
  def _parts(self) -> tuple[nnx.GraphDef[Any], nnx.State, nnx.State]:
    model_check.refuse_unsafe(findings(self.shapes, (), is_alone=False))
    graph, *states = nnx.split(self.shapes, nnx.Param, nnx.RngState)
    params, streams = states
    return graph, params, streams

  def init(self, key: jax.Array, inputs: Any) -> PyTree:
    """Returns the parameters, as nested dicts."""
    del inputs
    assert self._parts
    return _plain(nnx.state(self.module(key), nnx.Param))

  def merge(self, params: PyTree, key: jax.Array | None = None) -> nnx.Module:
    """Returns a module with these parameters."""
    graph, template, streams = self._parts
    state = [
      (path, variable.replace(model_lib.at(params, _names(path))))
      for path, variable in nnx.to_flat_state(template)
    ]
    fresh = reseeded(streams, jax.random.key(0) if key is None else key)
    return nnx.merge(graph, nnx.from_flat_state(state), fresh)

  def apply(self, params: PyTree, inputs: Any, rng: jax.Array | None) -> Any:
    """Returns the outputs for one example."""
    module: Any = self.merge(params, rng)
    if rng is None:
      module.eval()
    else:
      module.train()
    return module(inputs)


def of(
  make: Any, *, is_made: bool, fix: bool, has_batch_axis: bool
) -> model_lib.Model:
  """Returns the functions of a module, or of what makes one of a key."""
  functions = _Functions(
    make, is_made=is_made, fix=fix, has_batch_axis=has_batch_axis
  )
  shapes = functions.shapes
  return model_lib.Model(
    name=type(shapes).__name__,
    init=functions.init,
    apply=functions.apply,
    findings=lambda inputs: [*findings(shapes, (), is_alone=False)],
    merge=functions.merge,
    changes=tuple(functions.changes),
    partitioning=getattr(shapes, "partitioning", ()),
    takes_images=getattr(shapes, "takes_images", False),
  )


def findings(
  model: nnx.Module, inputs: tuple[Any, ...], *, is_alone: bool
) -> Iterator[model_check.Finding]:
  """Yields what is unsafe in a module; see `dpdist.check_model`."""
  del inputs
  inside: list[str] = []
  for path, module in nnx.iter_modules(model):
    where = "/".join(map(str, path))
    if isinstance(module, nnx.BatchNorm):
      inside.append(where)
      yield model_check.batch_norm("BatchNorm", where, _NORM)
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    where = "/".join(map(str, path))
    if isinstance(variable, nnx.Param) or any(
      where.startswith(f"{name}/") for name in inside
    ):
      continue
    kind = type(variable).__name__
    if not isinstance(variable, nnx.RngState):
      yield model_check.Finding(
        f"state that is no nnx.Param ({kind})",
        where,
        model_check.KEEPS,
        "nnx.Param",
      )
    elif is_alone:
      yield model_check.Finding(
        f"stochastic state ({kind})",
        where,
        "a loss of one example cannot advance it, and all examples would share"
        " its random numbers",
        "dpdist.frontends.nnx.per_example_loss, which gives every example its"
        " own, and check that loss_fn",
      )


def reseeded(streams: nnx.State, rng: jax.Array) -> nnx.State:
  """Returns random streams with keys made from rng, and counts at 0."""
  numbers = iter(range(len(jax.tree.leaves(streams))))

  def fresh(path: Any, variable: Any) -> Any:
    del path
    number = next(numbers)
    value = variable.get_value()
    if isinstance(variable, nnx.RngKey):
      return variable.replace(jax.random.fold_in(rng, number))
    return variable.replace(jax.numpy.zeros(value.shape, value.dtype))

  return nnx.map_state(fresh, streams)


class GroupNormForBatchNorm(nnx.GroupNorm):
  """A group norm that is called as a batch norm is.

  Attributes:
    has_batch_axis: whether the first axis is of examples; if not, there is one.
  """

  has_batch_axis: bool = True

  def __call__(
    self,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Normalises each example by itself; see `flax.nnx.GroupNorm`."""
    del use_running_average
    if self.has_batch_axis:
      return super().__call__(x, mask=mask)
    found: jax.Array = super().__call__(
      x[None], mask=None if mask is None else mask[None]
    )
    return found[0]


def replaced(
  model: nnx.Module, *, has_batch_axis: bool = True
) -> tuple[nnx.Module, list[str]]:
  """Replaces batch norms by group norms, in a copy of the module.

  Returns the copy and what was done. A batch norm whose features are not the
  last axis, or that has an axis more than one layer's, stays.
  """
  model, changes = nnx.clone(model), []
  for path, norm in [*nnx.iter_modules(model)]:
    if not isinstance(norm, nnx.BatchNorm) or not path or norm.axis != -1:
      continue
    variables = (norm.mean, norm.var, norm.scale, norm.bias)
    shapes = {x.shape for x in variables if x is not None}
    if shapes != {(norm.num_features,)}:
      continue
    groups = norms.num_groups(norm.num_features)
    new = GroupNormForBatchNorm(
      norm.num_features,
      groups,
      epsilon=norm.epsilon,
      dtype=norm.dtype,
      param_dtype=norm.param_dtype,
      use_bias=norm.use_bias,
      use_scale=norm.use_scale,
      rngs=nnx.Rngs(0),
    )
    new.has_batch_axis = has_batch_axis
    parent: Any = model
    for name in path[:-1]:
      parent = _child(parent, name)
    if isinstance(path[-1], int) or isinstance(parent, dict):
      parent[path[-1]] = new
    else:
      setattr(parent, str(path[-1]), new)
    changes.append(norms.sentence("/".join(map(str, path)), str(groups)))
  return model, changes


def _child(parent: Any, name: Any) -> Any:
  if isinstance(name, int) or isinstance(parent, dict):
    return parent[name]
  return getattr(parent, name)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(map(str, path))


def _plain(state: nnx.State) -> dict[str, Any]:
  """Returns a state as nested dicts of arrays, with strings as keys."""
  return model_lib.nested(
    {
      _names(path): variable.get_value()
      for path, variable in nnx.to_flat_state(state)
    }
  )

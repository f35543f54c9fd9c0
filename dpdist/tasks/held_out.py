"""Computes a task's metrics of held-out examples.

Held-out examples are not protected: their metrics are released without noise.
"""

from collections.abc import Callable, Iterator, Mapping
import copy
import math
import re
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from dpdist import errors
from dpdist.distributed import mesh as mesh_lib
from dpdist.tasks import task as task_lib

PyTree = Any

# Most bytes of predictions on a device in one pass over held-out examples: the
# logits of a large vocabulary need far more memory than a training step.
_MOST_BYTES = 1 << 28
_NAME = re.compile(r"[A-Za-z0-9_.@-]+")


class Evaluator:
  """Maps parameters to held-out metrics.

  Attributes:
    names: the names of the task's declared metrics that are numbers.
  """

  def __init__(
    self,
    task: task_lib.Task,
    test: Mapping[str, np.ndarray],
    mesh: Mesh,
    params: PyTree,
    *,
    tell: Callable[[str], None] | None = None,
  ):
    """Traces the task's metrics; computes none yet.

    Args:
      task: the task whose metrics are computed.
      test: arrays of all held-out examples.
      mesh: the devices that the examples are divided over. A pass has about
        1,024 examples, or fewer if their predictions would need more than 256
        MiB on a device.
      params: all parameters, or their shapes.
      tell: is called with a sentence, once, if a metric of all examples fails:
        it is NaN then, so that it ends no run. None: it raises.

    Raises:
      ValueError: the metrics are not {name: (value, weight)}, or a name is not
        made of letters, digits and any of _.@-; or what the task predicts is
        no array.
    """
    self._tell = tell
    self._shown: set[str] = set()
    self._test, self._mesh = test, mesh
    self._size = len(next(iter(test.values())))
    self._metrics = task.metrics or _loss_alone(task)
    # In the order of the task: JAX sorts the names of a mapping.
    self.names: tuple[str, ...] = ()
    self._means: tuple[str, ...]

    def traced(params: PyTree, example: PyTree) -> PyTree:
      found = _checked(self._metrics(params, example))
      self.names = tuple(found)
      return found

    example = {
      name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
      for name, x in test.items()
    }
    found = task_lib.shapes_of("metrics", traced, params, example)
    if task.predict is not None:
      found = task_lib.shapes_of("predict", task.predict, params, example)
    size = sum(leaf.size for leaf in jax.tree.leaves(found))
    shards = mesh_lib.num_example_shards(mesh)
    fitting = max(1, _MOST_BYTES // (4 * max(1, size))) * shards
    rows = min(1024, self._size, fitting)
    self._rows = rows + -rows % shards
    self._sums = jax.jit(self.sums)
    self._summary = task.summary
    self._means = self.names
    if self._summary is not None:
      self.names = self._summary.names
      if self._summary.outputs is not None:
        _check_collected(self._summary, params, example, test)
        # Whole on every device, so that each process has all of them.
        self._outputs = jax.jit(
          _float32(jax.vmap(self._summary.outputs, (None, 0))),
          out_shardings=mesh_lib.replicated(mesh),
        )

  def on(self, test: Mapping[str, np.ndarray]) -> Self:
    """Returns the same for held-out examples of the same shapes and number.

    What was compiled stays.
    """
    shapes = lambda arrays: {k: (x.shape, x.dtype) for k, x in arrays.items()}
    if shapes(test) != shapes(self._test):
      raise ValueError(
        f"test must have shapes {shapes(self._test)}, got {shapes(test)}"
      )
    made = copy.copy(self)
    made._test = test
    return made

  def __call__(
    self, params: PyTree, num_passes: int | None = None
  ) -> dict[str, float]:
    """Returns the metrics: sums of values over sums of weights.

    A metric whose weights add up to 0 says nothing, and is NaN. Metrics that
    are no means come from the task's `Summary`.

    Args:
      params: all parameters.
      num_passes: how many passes to make, when the aim is to compile and to
        see whether they fit in memory, and whether metrics can be computed; the
        metrics are then wrong. None: all.

    Raises:
      ValueError: a user's metric fails, and there are few passes or no `tell`.
    """
    total: dict[str, list[float]] = {name: [0.0, 0.0] for name in self._means}
    for rows, batch in self._passes(num_passes):
      is_real = self._put(rows < self._size)
      found = self._sums(params, batch, is_real)
      for name, sums in total.items():
        for i, value in enumerate(found[name]):
          sums[i] += float(value)
    means: dict[str, float] = {
      name: value / weight if weight else math.nan
      for name, (value, weight) in total.items()
    }
    if self._summary is None:
      return means
    summary = self._summary
    for name, (mean, function) in summary.of_means.items():
      means[name] = function(means[mean])
    if summary.numbers:
      collected = self._collected(params, num_passes)
      for name in summary.numbers:
        means[name] = self._number(name, *collected, is_trial=bool(num_passes))
    return {name: means[name] for name in self.names}

  def _number(
    self, name: str, targets: np.ndarray, outputs: np.ndarray, *, is_trial: bool
  ) -> float:
    """Returns a metric of all examples; NaN if it fails after the trial."""
    assert self._summary is not None
    try:
      value = self._summary.numbers[name](targets, outputs)
      if math.isfinite(value) or not is_trial or not np.isfinite(outputs).all():
        return value
      problem = (
        f"the held-out metric {name!r} is {value} for a model that has not"
        " begun to learn: it must return a finite number to be of use"
      )
    except errors.ArgumentError as error:
      if is_trial or self._tell is None:
        raise
      value, problem = math.nan, f"{error}: the metric is NaN"
    if self._tell is not None and problem not in self._shown:
      self._shown.add(problem)
      self._tell(problem)
    return value

  def tables(
    self, params: PyTree, num_passes: int | None = None
  ) -> dict[str, Any]:
    """Returns the metrics that are lists or dicts; must run in all processes.

    Args:
      params: all parameters.
      num_passes: as for a call.
    """
    if self._summary is None or not self._summary.tables:
      return {}
    given = self._collected(params, num_passes)
    return {name: f(*given) for name, f in self._summary.tables.items()}

  def _passes(
    self, num_passes: int | None
  ) -> Iterator[tuple[np.ndarray, dict[str, jax.Array]]]:
    """Yields the numbers of the rows of each pass, and the rows on the mesh."""
    for start in range(0, self._size, self._rows)[:num_passes]:
      rows = np.arange(start, start + self._rows)
      yield (
        rows,
        {
          name: self._put(array[np.minimum(rows, self._size - 1)])
          for name, array in self._test.items()
        },
      )

  def _collected(
    self, params: PyTree, num_passes: int | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns targets and outputs of all held-out examples, in their order.

    Outputs for which no pass was made are those of other examples.
    """
    assert self._summary is not None
    outputs = np.concatenate(
      [
        mesh_lib.whole(self._outputs(params, batch))
        for _, batch in self._passes(num_passes)
      ]
    )
    outputs = np.resize(outputs, (self._size, *outputs.shape[1:]))
    # A copy: a user's metric may write to it.
    return self._test[self._summary.targets].copy(), outputs

  def sums(
    self, params: PyTree, batch: Mapping[str, jax.Array], is_real: jax.Array
  ) -> PyTree:
    """Returns a pass's sums of values and weights, by name; traced."""
    metrics = lambda params, example: _checked(self._metrics(params, example))
    found = jax.vmap(metrics, (None, 0))(params, batch)

    def add(x: jax.Array) -> jax.Array:
      if jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      kept = is_real.reshape(is_real.shape + (1,) * (x.ndim - 1))
      return jnp.sum(jnp.where(kept, x, 0))

    return jax.tree.map(add, found)

  def _put(self, x: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(
      x.shape, mesh_lib.examples(self._mesh), lambda i: x[i]
    )


def problem(
  task: task_lib.Task,
  scores: Mapping[str, float],
  test: Mapping[str, np.ndarray],
) -> str:
  """Returns a sentence that says why such a model is of no use, or ""."""
  if task.problem is not None:
    try:
      return str(task.problem(scores, test) or "")
    except Exception as error:
      # A user's function may raise anything, and the run is over: keep it.
      return f"problem of the task raises {errors.in_a_line(error)}"
  for name, value in scores.items():
    if not math.isfinite(value):
      return f"the held-out {name} is {value}: the model is of no use"
  return ""


def _check_collected(
  summary: task_lib.Summary,
  params: PyTree,
  example: Mapping[str, Any],
  test: Mapping[str, np.ndarray],
) -> None:
  """Raises ValueError unless metrics of all examples can be given arrays."""
  if summary.targets not in test:
    raise errors.ArgumentError(
      f"targets of the metrics must be one of {sorted(test)}, which the"
      f" held-out part has, got {summary.targets!r}"
    )
  assert summary.outputs is not None
  found = task_lib.shapes_of("predict", summary.outputs, params, example)
  if not isinstance(found, jax.ShapeDtypeStruct):
    raise errors.ArgumentError(
      f"predict must return one array, got a {type(found).__name__}"
    )


def _loss_alone(task: task_lib.Task) -> Any:
  """Returns metrics of the loss, under a fixed key."""

  def metrics(params: PyTree, example: PyTree) -> PyTree:
    loss, _ = task.loss(params, example, jax.random.key(0))
    return {"loss": (loss, 1)}

  return metrics


def _float32(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function whose result NumPy and its users can compute with."""
  return lambda *given: function(*given).astype(jnp.float32)


def _checked(found: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns metrics as arrays.

  Raises:
    ValueError: they are not {name: (value, weight)}.
  """
  rule = "a task's metrics must return {name: (value, weight)}"
  if not isinstance(found, Mapping) or not found:
    raise errors.ArgumentError(f"{rule}, got {found!r}")
  arrays = {}
  for name, pair in found.items():
    if not isinstance(name, str) or not _NAME.fullmatch(name):
      raise errors.ArgumentError(
        f"{rule} with names of letters, digits and any of _.@-, got {name!r}"
      )
    if not isinstance(pair, tuple) or len(pair) != 2:
      raise errors.ArgumentError(f"{rule}, got {pair!r} for {name!r}")
    arrays[name] = (jnp.asarray(pair[0]), jnp.asarray(pair[1]))
  return arrays

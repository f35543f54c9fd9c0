"""The loss of one example, or of one user, and held-out metrics."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from dpdist import clipping
from dpdist.distributed import mesh as mesh_lib

PyTree = Any

# Most bytes of logits on a device in one pass over held-out examples: those of
# a large vocabulary need far more memory than a training step.
_LOGITS_BYTES = 1 << 28


def cross_entropy(model: nn.Module) -> Callable[..., tuple[jax.Array, None]]:
  """Returns the mean cross-entropy of a model's logits for one example.

  Targets outside [0, classes) do not count. Where an example has many, its loss
  is the mean over the others, so a sequence may be padded with -1. For an
  example without a target, loss and gradient are 0. Nothing else can be done
  about a bad label in private data: refusing it would reveal it, and an index
  that wraps around, or a NaN, would silently train on it or drop it.

  Args:
    model: maps example["inputs"] to logits [..., classes].

  Returns:
    loss_fn(params, example, rng) -> (loss, None); rng feeds the model's
    dropout, if it has any.
  """

  def loss_fn(
    params: PyTree, example: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[jax.Array, None]:
    logits: Any = model.apply(
      {"params": params}, example["inputs"], rngs={"dropout": rng}
    )
    targets = example["targets"]
    is_target = (targets >= 0) & (targets < logits.shape[-1])
    loss = _cross_entropy(logits, jnp.where(is_target, targets, 0))
    if not loss.ndim:
      return jnp.where(is_target, loss, 0), None
    count = jnp.maximum(1, jnp.sum(is_target))
    return jnp.sum(jnp.where(is_target, loss, 0)) / count, None

  return loss_fn


def mean_over_unit(
  loss_fn: Callable[..., tuple[jax.Array, None]], *, empty_slot: str
) -> Callable[..., tuple[jax.Array, None]]:
  """Returns the mean of a loss over the examples of one unit, such as a user.

  Its gradient is clipped as one, so the clip norm bounds how far a user moves a
  sum, however many examples they have.

  Guarantees:
    * A unit without examples has the loss 0, whose gradient is exactly 0.
    * The values in empty slots have no effect, even if they are NaN.

  Args:
    loss_fn: (params, example, rng) -> (loss, None), for one example.
    empty_slot: the name of the unit's array, bool [slots], that is True for
      slots without an example; see `dpdist.data.users`.

  Returns:
    loss_fn(params, unit, rng) -> (loss, None); a unit's other arrays are those
    of an example with a leading axis [slots]. Each slot has its own rng.
  """

  mean = clipping.mean_of_group(loss_fn, has_aux=True)

  def unit_loss(
    params: PyTree, unit: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[jax.Array, None]:
    examples = {name: x for name, x in unit.items() if name != empty_slot}
    return mean(params, (examples, unit[empty_slot]), rng)

  return unit_loss


def mean_over_copies(
  loss_fn: Callable[..., tuple[jax.Array, None]],
  change: Callable[[jax.Array, jax.Array], jax.Array],
  multiplicity: int,
) -> Callable[..., tuple[jax.Array, None]]:
  """Returns the mean of a loss over randomly changed copies of one example.

  This is augmentation multiplicity (De et al. 2022, "Unlocking High-Accuracy
  Differentially Private Image Classification through Scale", section 3.2; Fort
  et al. 2021). Copies are averaged before the example's one gradient is
  clipped, so it moves a sum by at most the clip norm, however many copies there
  are: they cost time, but no privacy.

  Args:
    loss_fn: (params, example, rng) -> (loss, None).
    change: (key, inputs) -> inputs of the same shape.
    multiplicity: K, the number of copies; at least 1.

  Returns:
    loss_fn(params, example, rng) -> (loss, None). Copies depend on rng alone,
    which is the example's own at a step.
  """
  mean = clipping.mean_of_group(loss_fn, has_aux=True)

  def copies_loss(
    params: PyTree, example: Mapping[str, jax.Array], rng: jax.Array
  ) -> tuple[jax.Array, None]:
    change_key, loss_key = jax.random.split(rng)
    keys = jax.random.split(change_key, multiplicity)
    copies = {
      name: jnp.broadcast_to(x, (multiplicity, *x.shape))
      for name, x in example.items()
    }
    copies["inputs"] = jax.vmap(change)(keys, copies["inputs"])
    is_padding = jnp.zeros(multiplicity, bool)
    return mean(params, (copies, is_padding), loss_key)

  return copies_loss


def evaluator(
  model: nn.Module, test: Mapping[str, np.ndarray], mesh: Mesh
) -> Callable[..., dict[str, float]]:
  """Makes a function from parameters to held-out metrics.

  The held-out examples are not protected: their metrics are released without
  noise.

  Args:
    model: as in `cross_entropy`.
    test: arrays "inputs" and "targets" of all held-out examples.
    mesh: the examples are divided over it, in passes of about 1,024, or as
      many as have 256 MiB of logits on a device.

  Returns:
    A function (params, num_passes=None) -> {"accuracy", "loss"}, means over all
    targets, except those of a sequence below 0, which are padding. With
    num_passes it makes only so many passes, and the means are wrong: use it to
    compile the function and to see whether it fits in memory.
  """
  size = test["targets"].shape[0]
  shards = mesh_lib.num_example_shards(mesh)
  sharding = mesh_lib.examples(mesh)

  @jax.jit
  def sums(
    params: PyTree, batch: Mapping[str, jax.Array], is_real: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    apply: Any = functools.partial(model.apply, {"params": params})
    logits = jax.vmap(apply)(batch["inputs"])
    loss = _cross_entropy(logits, batch["targets"])
    hits = jnp.argmax(logits, -1) == batch["targets"]
    is_real = is_real.reshape(is_real.shape + (1,) * (hits.ndim - 1))
    if hits.ndim > 1:
      is_real &= batch["targets"] >= 0
    return jnp.sum(jnp.where(is_real, loss, 0)), jnp.sum(hits & is_real)

  def put(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  def rows_of_a_pass(params: PyTree) -> int:
    logits: Any = jax.eval_shape(
      model.apply, {"params": params}, test["inputs"][0]
    )
    fitting = max(1, _LOGITS_BYTES // (4 * logits.size)) * shards
    rows = min(1024, size, fitting)
    return rows + -rows % shards

  def evaluate(
    params: PyTree, num_passes: int | None = None
  ) -> dict[str, float]:
    loss, hits = 0.0, 0
    rows = rows_of_a_pass(params)
    for start in range(0, size, rows)[:num_passes]:
      kept = np.arange(start, start + rows)
      batch = {
        name: put(array[np.minimum(kept, size - 1)])
        for name, array in test.items()
      }
      more_loss, more_hits = sums(params, batch, put(kept < size))
      loss += float(more_loss)
      hits += int(more_hits)
    total = size
    if test["targets"].ndim > 1:
      total = max(1, int(np.sum(test["targets"] >= 0)))
    return {"accuracy": hits / total, "loss": loss / total}

  return evaluate


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]

"""Makes the loss of one example of a Flax Linen module.

loss_fn = linen.per_example_loss(
  model, lambda logits, example: cross_entropy(logits, example["label"]),
  inputs=lambda example: example["image"])
params = model.init(key, image)["params"]
fn = dpdist.clipped_grad(loss_fn, l2_clip_norm=1.0)
fn(params, batch, rng=key)
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import errors as flax_errors
from flax import linen as nn
import jax

from dpdist import errors

PyTree = Any


def per_example_loss(
  model: nn.Module,
  loss: Callable[[Any, PyTree], jax.Array],
  *,
  inputs: Callable[[PyTree], Any] = lambda example: example[0],
  rngs: Sequence[str] = ("dropout",),
  has_batch_axis: bool = False,
  **call: Any,
) -> Callable[..., jax.Array]:
  """Makes loss_fn(params, example, rng=None) from a module.

  Args:
    model: a module whose only variables are "params".
    loss: (outputs, example) -> a number, for one example.
    inputs: maps an example to the module's arguments.
    rngs: names of the random streams that the module uses; each gets a key of
      its own, from the example's. Without an rng it gets no keys.
    has_batch_axis: whether the module expects a batch axis; it then gets a
      batch of one, and loss gets its only row.
    **call: passed to the module, such as train=True.

  Returns:
    loss_fn for `dpdist.clipped_grad` and `dpdist.private_gradients`.

  Raises:
    ValueError: on a call, if the module has or changes variables other than
      parameters, as batch norm does.
  """

  def loss_fn(
    params: PyTree, example: PyTree, rng: jax.Array | None = None
  ) -> jax.Array:
    if set(params) == {"params"} or "batch_stats" in params:
      raise errors.ArgumentError(
        "params must be the collection 'params' alone, such as"
        f" model.init(...)['params'], got the collections {sorted(params)}"
      )
    x = inputs(example)
    if has_batch_axis:
      x = jax.tree.map(lambda leaf: leaf[None], x)
    keys = {}
    if rng is not None:
      keys = {name: jax.random.fold_in(rng, i) for i, name in enumerate(rngs)}
    try:
      outputs = model.apply({"params": params}, x, rngs=keys, **call)
    except (
      flax_errors.ModifyScopeVariableError,
      flax_errors.ScopeCollectionNotFound,
    ) as error:
      raise errors.ArgumentError(
        "model must have no variables but its parameters, since what it keeps"
        " of the examples is not noised: use flax.linen.GroupNorm or LayerNorm"
        " in place of BatchNorm, and dpdist.with_state for state that depends"
        f" on no example. {str(error).splitlines()[0]}"
      ) from error
    if has_batch_axis:
      outputs = jax.tree.map(lambda leaf: leaf[0], outputs)
    return loss(outputs, example)

  return loss_fn

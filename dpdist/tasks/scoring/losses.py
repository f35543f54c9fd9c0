"""The losses of tasks: numbers of one example's outputs and targets.

A target that cannot be right counts as none: it has no part in the loss, and no
gradient. This is all that can be done about it in private data. Refusing it
would reveal it, an index that wraps around would silently train on another
class, and a NaN would drop the example.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from dpdist import _validation

_NO_CANDIDATE = -1e30


def cross_entropy(
  logits: jax.Array,
  targets: jax.Array,
  *,
  class_weights: Sequence[float] | None = None,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Returns the mean cross-entropy over the targets that are classes.

  Args:
    logits: [..., classes].
    targets: integers [...]; those outside [0, classes) do not count.
    class_weights: factors of the loss by class.
    label_smoothing: the share s of a target that is spread over all classes,
      so that its own has 1 - s + s / classes (Szegedy et al. 2016).
  """
  is_target = (targets >= 0) & (targets < logits.shape[-1])
  safe = jnp.where(is_target, targets, 0)
  loss = negative_log_likelihood(logits, safe)
  if label_smoothing:
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    spread = -jnp.mean(log_probs, -1)
    loss = (1 - label_smoothing) * loss + label_smoothing * spread
  if class_weights is not None:
    loss = loss * jnp.asarray(class_weights, jnp.float32)[safe]
  return mean_where(loss, is_target)


def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the cross-entropy of each target, all of which are classes."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]


def sigmoid_cross_entropy(
  logits: jax.Array,
  targets: jax.Array,
  *,
  weights: jax.Array | None = None,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Returns the mean binary cross-entropy over the targets in [0, 1].

  Args:
    logits: [...].
    targets: numbers [...], 0 or 1 or a probability; others do not count.
    weights: factors of the losses, of shape [...].
    label_smoothing: the share s of a target that is moved to 1/2.
  """
  is_target = is_probability(targets)
  safe = jnp.where(is_target, targets, 0).astype(jnp.float32)
  if label_smoothing:
    safe = (1 - label_smoothing) * safe + label_smoothing / 2
  loss = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), safe)
  return mean_where(loss if weights is None else loss * weights, is_target)


def is_probability(targets: jax.Array) -> jax.Array:
  """Returns which targets are in [0, 1]; a NaN is not."""
  return (targets >= 0) & (targets <= 1)


ERRORS = {
  "squared": lambda error, delta: error**2,
  "absolute": lambda error, delta: jnp.abs(error),
  "huber": lambda error, delta: optax.huber_loss(error, delta=delta),
}
"""Losses of a number's error; delta is where Huber's becomes linear."""


def mean_error(
  outputs: jax.Array, targets: jax.Array, *, kind: str, delta: float = 1.0
) -> jax.Array:
  """Returns the mean loss of a kind in `ERRORS` over the finite targets."""
  is_target = jnp.isfinite(targets)
  # Before the difference: NaN times 0 would be NaN in a gradient.
  safe = jnp.where(is_target, targets, 0).astype(jnp.float32)
  error = outputs.astype(jnp.float32) - safe
  return mean_where(ERRORS[kind](error, delta), is_target)


def pair_logits(
  anchors: jax.Array,
  positives: jax.Array,
  is_pair: jax.Array,
  *,
  temperature: float,
  is_cosine: bool = True,
  negatives: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns pairs as a classification: which candidate is an anchor's own?

  The cross-entropy of it is InfoNCE (van den Oord et al. 2018).

  Args:
    anchors: [pairs, size].
    positives: [pairs, size]; those of other pairs are negatives.
    is_pair: bool [pairs]; what is no pair is no candidate either.
    temperature: what similarities are divided by.
    is_cosine: whether vectors are divided by their norms.
    negatives: [more, size], candidates that are nobody's positive.

  Returns:
    float32 logits [pairs, candidates], and targets int32 [pairs], -1 where
    there is no pair.
  """
  candidates, is_candidate = positives, is_pair
  if negatives is not None:
    candidates = jnp.concatenate([positives, negatives])
    more = jnp.ones(len(negatives), bool)
    is_candidate = jnp.concatenate([is_pair, more])
  if is_cosine:
    anchors, candidates = _unit(anchors), _unit(candidates)
  found = anchors.astype(jnp.float32) @ candidates.astype(jnp.float32).T
  # Finite, so that no gradient is infinity times 0.
  logits = jnp.where(is_candidate, found / temperature, _NO_CANDIDATE)
  numbers = jnp.arange(len(anchors), dtype=jnp.int32)
  return logits, jnp.where(is_pair, numbers, -1)


def mean_where(loss: jax.Array, counts: jax.Array) -> jax.Array:
  """Returns the mean of the losses that count, 0 if none does."""
  if not loss.ndim:
    return jnp.where(counts, loss, 0)
  number = jnp.maximum(1, jnp.sum(counts))
  return jnp.sum(jnp.where(counts, loss, 0)) / number


def weighted(loss: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns the loss times a weight; one that is below 0 or no number is 0.

  Raises:
    ValueError: the weight is not one number for an example.
  """
  _validation.require(weight.ndim == 0, "weight", "one number", weight.shape)
  weight = weight.astype(jnp.float32)
  is_weight = jnp.isfinite(weight) & (weight >= 0)
  return loss * jnp.where(is_weight, weight, 0)


def _unit(x: jax.Array) -> jax.Array:
  # The norm of 0 has no gradient; this one has.
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-12)

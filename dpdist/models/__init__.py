"""Flax models for the configs, by name."""

from flax import linen as nn
import jax.numpy as jnp
import ml_collections

from dpdist.models import cnn
from dpdist.models import decoder
from dpdist.models import random_features

_DTYPES = ("float32", "bfloat16")


def make(config: ml_collections.ConfigDict) -> nn.Module:
  """Makes the model of `config.model`.

  A model maps the inputs of one example, without a batch axis, to logits:
  [classes], or [length, vocabulary] for a language model. Parameters are
  float32 whatever the dtype of the computation.

  Raises:
    ValueError: unknown name or dtype, or a size that is missing.
  """
  if config.dtype not in _DTYPES:
    raise ValueError(
      f"model.dtype must be one of {_DTYPES}, got {config.dtype!r}"
    )
  dtype = jnp.dtype(config.dtype)
  if config.name == "random_features":
    return random_features.RandomFeatures(
      _size(config, "num_outputs"), _size(config, "width"), dtype
    )
  if config.name == "cnn":
    return cnn.CNN(_size(config, "num_outputs"), _size(config, "width"), dtype)
  if config.name == "decoder":
    return decoder.Decoder(
      vocabulary=_size(config, "num_outputs"),
      width=_size(config, "width"),
      depth=_size(config, "depth"),
      num_heads=_size(config, "num_heads"),
      dtype=dtype,
    )
  raise ValueError(
    f"model.name must be random_features, cnn or decoder, got {config.name!r}"
  )


def _size(config: ml_collections.ConfigDict, name: str) -> int:
  if config[name] < 1:
    raise ValueError(
      f"model.{name} must be at least 1 for model.name={config.name!r}, got"
      f" {config[name]}"
    )
  return config[name]

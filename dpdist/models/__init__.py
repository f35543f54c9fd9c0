"""Flax models for the configs, by name."""

from flax import linen as nn
import jax.numpy as jnp
import ml_collections

from dpdist import mesh
from dpdist.models import cnn
from dpdist.models import decoder
from dpdist.models import linear
from dpdist.models import random_features
from dpdist.models import stacked_decoder
from dpdist.models import wide_resnet

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
  if config.name == "linear":
    return linear.Linear(_size(config, "num_outputs"), config.num_groups, dtype)
  if config.name == "wide_resnet":
    depth = _size(config, "depth")
    if depth < 10 or depth % 6 != 4:
      raise ValueError(
        "model.depth must be 10, 16, 22, 28, ... for"
        f" model.name='wide_resnet', got {depth}"
      )
    return wide_resnet.WideResNet(
      num_outputs=_size(config, "num_outputs"),
      depth=depth,
      width=_size(config, "width"),
      num_groups=_size(config, "num_groups"),
      dtype=dtype,
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
  if config.name == "stacked_decoder":
    width, num_heads = _size(config, "width"), _size(config, "num_heads")
    num_kv_heads = config.num_kv_heads or num_heads
    if num_heads % num_kv_heads:
      raise ValueError(
        f"model.num_kv_heads must divide the model.num_heads of {num_heads},"
        f" got {num_kv_heads}"
      )
    head_dim = config.head_dim or width // num_heads
    if head_dim < 2 or head_dim % 2:
      raise ValueError(
        "model.head_dim, by default width over heads, must be even, got"
        f" {head_dim}"
      )
    return stacked_decoder.StackedDecoder(
      vocabulary=_size(config, "num_outputs"),
      width=width,
      depth=_size(config, "depth"),
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      hidden=config.hidden or 4 * width,
      dtype=dtype,
    )
  raise ValueError(
    "model.name must be linear, random_features, cnn, wide_resnet, decoder or"
    f" stacked_decoder, got {config.name!r}"
  )


def partitioning(model: nn.Module) -> mesh.Rules:
  """A model's own rules for the mesh axis `model`; empty without any."""
  return getattr(model, "partitioning", ())


def _size(config: ml_collections.ConfigDict, name: str) -> int:
  if config[name] < 1:
    raise ValueError(
      f"model.{name} must be at least 1 for model.name={config.name!r}, got"
      f" {config[name]}"
    )
  return config[name]

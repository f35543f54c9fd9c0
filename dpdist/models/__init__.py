"""Flax models for the configs, by name."""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
import ml_collections
import numpy as np

from dpdist.assets import weights
from dpdist.distributed import mesh
from dpdist.models import bert
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
  maker = _MAKERS.get(str(config.name))
  if maker is None:
    raise ValueError(
      "model.name must be linear, random_features, cnn, wide_resnet, decoder,"
      f" stacked_decoder or bert, got {config.name!r}"
    )
  return maker(config, jnp.dtype(config.dtype))


def from_disk(
  config: ml_collections.ConfigDict, model: nn.Module
) -> dict[str, np.ndarray]:
  """Reads the pretrained parameters of `config.model`.

  Args:
    config: its `weights` is a file, or a name known to `dpdist.assets.fetch`.
    model: the config's model.

  Returns:
    Arrays by the paths of the parameters, such as "block_0/query/kernel"; empty
    if the config names no weights.

  Raises:
    ValueError: there is no such file, or it does not fit the model.
    ModuleNotFoundError: the format's package is missing.
  """
  if not config.weights:
    return {}
  named: Any = getattr(model, "from_disk", None)
  if named is None:
    raise ValueError(
      f"model.weights must be empty for model.name={config.name!r}, which knows"
      f" no format of them, got {config.weights!r}"
    )
  return dict(named(weights.read(weights.locate(config.weights))))


def partitioning(model: nn.Module) -> mesh.Rules:
  """Returns a model's own rules for the mesh axis `model`; empty if none."""
  return getattr(model, "partitioning", ())


def _alpha(config: ml_collections.ConfigDict) -> float:
  alpha = config.lora_alpha
  if not 0 < alpha < math.inf:
    raise ValueError(
      f"model.lora_alpha must be above 0 and finite, got {alpha}"
    )
  return alpha


def _size(config: ml_collections.ConfigDict, name: str) -> int:
  if config[name] < 1:
    raise ValueError(
      f"model.{name} must be at least 1 for model.name={config.name!r}, got"
      f" {config[name]}"
    )
  return config[name]


def _random_features(
  config: ml_collections.ConfigDict, dtype: Any
) -> nn.Module:
  return random_features.RandomFeatures(
    _size(config, "num_outputs"), _size(config, "width"), dtype
  )


def _linear(config: ml_collections.ConfigDict, dtype: Any) -> nn.Module:
  return linear.Linear(_size(config, "num_outputs"), config.num_groups, dtype)


def _wide_resnet(config: ml_collections.ConfigDict, dtype: Any) -> nn.Module:
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


def _cnn(config: ml_collections.ConfigDict, dtype: Any) -> nn.Module:
  return cnn.CNN(_size(config, "num_outputs"), _size(config, "width"), dtype)


def _decoder(config: ml_collections.ConfigDict, dtype: Any) -> nn.Module:
  return decoder.Decoder(
    vocabulary=_size(config, "num_outputs"),
    width=_size(config, "width"),
    depth=_size(config, "depth"),
    num_heads=_size(config, "num_heads"),
    dtype=dtype,
  )


def _bert(config: ml_collections.ConfigDict, dtype: Any) -> nn.Module:
  width, num_heads = _size(config, "width"), _size(config, "num_heads")
  if width % num_heads:
    raise ValueError(
      f"model.num_heads must divide the model.width of {width}, got {num_heads}"
    )
  depth = _size(config, "depth")
  if not 0 <= config.first_block < depth:
    raise ValueError(
      f"model.first_block must be in [0, {depth}) for model.depth={depth},"
      f" got {config.first_block}"
    )
  return bert.Bert(
    classes=_size(config, "num_outputs"),
    # A model that takes states has no embeddings.
    vocabulary=0 if config.first_block else _size(config, "vocabulary"),
    positions=_size(config, "positions"),
    width=width,
    depth=depth,
    num_heads=num_heads,
    hidden=config.hidden or 4 * width,
    lora_rank=config.lora_rank,
    lora_alpha=_alpha(config),
    dtype=dtype,
    first_block=config.first_block,
  )


def _stacked_decoder(
  config: ml_collections.ConfigDict, dtype: Any
) -> nn.Module:
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
    rope_theta=config.rope_theta,
    norm_epsilon=config.norm_epsilon,
    lora_rank=config.lora_rank,
    lora_alpha=_alpha(config),
  )


_MAKERS: dict[str, Callable[[ml_collections.ConfigDict, Any], nn.Module]] = {
  "linear": _linear,
  "random_features": _random_features,
  "cnn": _cnn,
  "wide_resnet": _wide_resnet,
  "decoder": _decoder,
  "stacked_decoder": _stacked_decoder,
  "bert": _bert,
}

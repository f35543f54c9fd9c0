"""Flax models for the configs, by name."""

import dataclasses
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
import ml_collections
import numpy as np

from dpdist import _validation
from dpdist import errors
from dpdist import registry
from dpdist.assets import weights
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
  float32 whatever the dtype of the computation. The name of `config.model` is
  one of ours, or finds a function of this config that returns a model as
  `dpdist.registry.resolve` does. Raises ValueError for an unknown name or
  dtype, or a missing size.
  """
  _validation.check("model.dtype", config.dtype, _validation.one_of(_DTYPES))
  maker = registry.resolve("model", config.name, setting="model.name")
  if config.get("options"):
    _validation.require(
      bool(registry.code_sha256("model", config.name, setting="model.name")),
      "model.options",
      f"empty for model.name={config.name!r}, which reads none of them",
      config.options.to_dict(),
    )
  model: nn.Module = maker(config)
  return model


def from_disk(
  config: ml_collections.ConfigDict, model: nn.Module
) -> dict[str, np.ndarray]:
  """Reads the pretrained parameters of a config's model.

  Returns arrays by the paths of the parameters, such as "block_0/query/kernel";
  none if `config.model` names no weights, a file or a name known to
  `dpdist.assets.fetch`. Raises ValueError if there is no such file, or it does
  not fit the model.
  """
  if not config.weights:
    return {}
  named: Any = getattr(model, "from_disk", None)
  if named is None:
    raise errors.ArgumentError(
      f"model.weights must be empty for model.name={config.name!r}, which knows"
      f" no format of them, got {config.weights!r}"
    )
  return dict(named(weights.read(weights.locate(config.weights))))


# Settings that a model may leave out, or that 0 means something for.
_MAY_BE_0 = ("first_block", "lora_rank", "num_groups")


def _made(
  module: type[nn.Module], config: ml_collections.ConfigDict, **options: Any
) -> nn.Module:
  """Returns a module whose fields are settings, or options of another name."""
  values: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), **options}
  # Flax adds "name" and "parent", which are no settings.
  known = {*config} - {*values, "name"}
  for field in dataclasses.fields(module):
    if field.name not in known:
      continue
    is_size = field.type is int and field.name not in _MAY_BE_0
    values[field.name] = (
      _size(config, field.name) if is_size else config[field.name]
    )
  if "lora_alpha" in values:
    positive = _validation.POSITIVE
    _validation.check("model.lora_alpha", config.lora_alpha, positive)
  return module(**values)


def _size(config: ml_collections.ConfigDict, name: str) -> int:
  _validation.require(
    config[name] >= 1,
    f"model.{name}",
    f"at least 1 for model.name={config.name!r}",
    config[name],
  )
  return int(config[name])


@registry.register("model", "random_features")
def _random_features(config: ml_collections.ConfigDict) -> nn.Module:
  return _made(random_features.RandomFeatures, config)


@registry.register("model", "linear")
def _linear(config: ml_collections.ConfigDict) -> nn.Module:
  return _made(linear.Linear, config)


@registry.register("model", "cnn")
def _cnn(config: ml_collections.ConfigDict) -> nn.Module:
  return _made(cnn.CNN, config)


@registry.register("model", "wide_resnet")
def _wide_resnet(config: ml_collections.ConfigDict) -> nn.Module:
  depth = _size(config, "depth")
  _validation.require(
    depth >= 10 and depth % 6 == 4,
    "model.depth",
    "10, 16, 22, 28, ... for model.name='wide_resnet'",
    depth,
  )
  num_groups = _size(config, "num_groups")
  return _made(wide_resnet.WideResNet, config, num_groups=num_groups)


@registry.register("model", "decoder")
def _decoder(config: ml_collections.ConfigDict) -> nn.Module:
  return _made(decoder.Decoder, config, vocabulary=_size(config, "num_outputs"))


@registry.register("model", "bert")
def _bert(config: ml_collections.ConfigDict) -> nn.Module:
  width, depth = _size(config, "width"), _size(config, "depth")
  _validation.require(
    width % _size(config, "num_heads") == 0,
    "model.num_heads",
    f"a divisor of the model.width of {width}",
    config.num_heads,
  )
  _validation.require(
    0 <= config.first_block < depth,
    "model.first_block",
    f"in [0, {depth}) for model.depth={depth}",
    config.first_block,
  )
  return _made(
    bert.Bert,
    config,
    classes=_size(config, "num_outputs"),
    # A model that takes states has no embeddings.
    vocabulary=0 if config.first_block else _size(config, "vocabulary"),
    hidden=config.hidden or 4 * width,
  )


@registry.register("model", "stacked_decoder")
def _stacked_decoder(config: ml_collections.ConfigDict) -> nn.Module:
  width, num_heads = _size(config, "width"), _size(config, "num_heads")
  num_kv_heads = config.num_kv_heads or num_heads
  _validation.require(
    num_heads % num_kv_heads == 0,
    "model.num_kv_heads",
    f"a divisor of the model.num_heads of {num_heads}",
    num_kv_heads,
  )
  head_dim = config.head_dim or width // num_heads
  _validation.require(
    head_dim >= 2 and head_dim % 2 == 0,
    "model.head_dim",
    "even (by default it is width over heads)",
    head_dim,
  )
  return _made(
    stacked_decoder.StackedDecoder,
    config,
    vocabulary=_size(config, "num_outputs"),
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    hidden=config.hidden or 4 * width,
  )

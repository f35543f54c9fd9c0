"""Exports parameters as safetensors, with a card that states their privacy.

The export is a folder of three files, as is usual in the field:
`model.safetensors`, `README.md` (see `dpdist.export.model_card`) and
`config.json`, from which `load` makes the model again; and `statistics.json`,
if inputs are made with private statistics of the training data. Nothing is
computed from a protected example, and no budget is spent.
"""

from collections.abc import Callable, Mapping
import json
import os
import pathlib
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import ml_collections
import numpy as np
from safetensors import numpy as safetensors

from dpdist import _validation
from dpdist import errors
from dpdist import models
from dpdist.distributed import mesh as mesh_lib
from dpdist.export import load_run
from dpdist.export import model_card
from dpdist.files import json_fields
from dpdist.tasks import parts
from dpdist.workdir import fingerprint

PyTree = Any

_PARAMS, _CARD, _CONFIG = "model.safetensors", "README.md", "config.json"
_STATISTICS = "statistics.json"


def write(
  released: load_run.Released,
  scores: dict[str, Any],
  output: str | os.PathLike[str],
  *,
  name: str,
  use_ema: bool = False,
) -> dict[str, Any]:
  """Writes the export folder of a checkpoint.

  Args:
    released: the checkpoint; see `dpdist.export.load_run.load`.
    scores: the result of `dpdist.export.load_run.evaluate` on it.
    output: a directory that is new or empty.
    name: of the model, for its card.
    use_ema: whether to write the average of the parameters.

  Returns:
    JSON-able: scores, with "params_sha256", "num_parameters", "uses_ema" and
    "output".

  Raises:
    ValueError: output is not empty, or the run keeps no average.
  """
  state = released.state
  if use_ema and state.ema_params is None:
    raise ValueError(
      "ema must be False for a run that keeps no average (ema_decay=0), got"
      " True"
    )
  params = state.ema_params if use_ema else state.params
  # Without the path of the weights: all parameters are here, and a path is
  # private.
  model = released.config.model.to_dict() | {"weights": ""}
  return write_folder(
    pathlib.Path(output),
    {name: mesh_lib.whole(leaf) for name, leaf in by_name(params).items()},
    model,
    scores
    | {
      "params_sha256": fingerprint.params_sha256(params),
      "uses_ema": use_ema,
    },
    lambda facts: model_card.text(released, facts, name),
    released.statistics,
  )


def write_folder(
  output: pathlib.Path,
  arrays: Mapping[str, np.ndarray],
  model: Mapping[str, Any],
  facts: Mapping[str, Any],
  card: Callable[[dict[str, Any]], str],
  statistics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Writes an export folder of arrays by name, and the settings of the model.

  `card` makes the model's card of the facts, with those that are added here.
  Returns them. The private statistics are those that inputs are made with.
  """
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise errors.ArgumentError(
      f"output must be a new or empty directory, got {str(output)!r}",
      hint=errors.Hint(flags=("--output=ANOTHER",)),
    )
  stated = {
    **facts,
    "num_parameters": sum(x.size for x in arrays.values()),
    "output": str(output),
  }
  output.mkdir(parents=True, exist_ok=True)
  settings = json.dumps({"model": dict(model)}, indent=2)
  (output / _CONFIG).write_text(settings + "\n")
  (output / _CARD).write_text(card(stated))
  if statistics is not None:
    text = json_fields.text(statistics) + "\n"
    (output / _STATISTICS).write_text(text)
  # Written last, and renamed, so that parameters never exist without their
  # card.
  temporary = output / (_PARAMS + ".tmp")
  # safetensors writes the memory of an array, whatever its strides are.
  flat = {name: np.require(x, requirements="C") for name, x in arrays.items()}
  safetensors.save_file(flat, temporary, metadata=_metadata(stated))
  # safetensors makes files that only their owner can read; give this one the
  # mode of the other files.
  temporary.chmod((output / _CARD).stat().st_mode & 0o777)
  os.replace(temporary, output / _PARAMS)
  return stated


def by_name(params: PyTree) -> dict[str, Any]:
  """Returns the leaves by their path in the tree, as "layers.0.weight"."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  named = {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }
  if len(named) < len(leaves):
    raise errors.ArgumentError(
      "parameters must have paths that differ when they are joined by dots, got"
      f" {sorted(named)} for {len(leaves)} parameters"
    )
  return named


def load(
  directory: str | os.PathLike[str], template: PyTree | None = None
) -> tuple[nn.Module | None, PyTree]:
  """Loads a model that `write` wrote.

  Args:
    directory: the folder.
    template: parameters whose places the loaded ones take, such as an Equinox
      module or what your task's `init` returns; None: nested dicts.

  Returns:
    The model, which maps the inputs of one example to logits, and its
    parameters, as for `model.apply({"params": params}, inputs)`. The model is
    None if the run's task was given as an object.

  Raises:
    ValueError: the template has other parameters, or of other shapes.
  """
  directory = pathlib.Path(directory)
  settings = json.loads((directory / _CONFIG).read_text())
  flat = safetensors.load_file(directory / _PARAMS)
  if template is None:
    params = traverse_util.unflatten_dict(flat, sep=".")
  else:
    wanted = {name: x.shape for name, x in by_name(template).items()}
    found = {name: x.shape for name, x in flat.items()}
    _validation.require(
      wanted == found, "template", f"a tree of parameters {found}", wanted
    )
    params = jax.tree.unflatten(
      jax.tree.structure(template), [flat[name] for name in wanted]
    )
  if settings["model"]["name"] == parts.GIVEN:
    return None, params
  return models.make(ml_collections.ConfigDict(settings["model"])), params


def _metadata(facts: dict[str, Any]) -> dict[str, str]:
  """Returns metadata, as texts, for the file itself, since cards get lost."""
  kept = {
    "format": "flax",
    "guarantee": facts["guarantee"],
    "step": str(facts["step"]),
    "params_sha256": facts["params_sha256"],
  }
  if facts["guarantee"] == "holds":
    kept |= {"epsilon": repr(facts["epsilon"]), "delta": repr(facts["delta"])}
  return kept

"""Makes tasks that train embeddings by telling pairs from others."""

from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from dpdist import _validation
from dpdist import errors
from dpdist.frameworks import model as model_lib
from dpdist.tasks import build
from dpdist.tasks import columns as columns_lib
from dpdist.tasks import task as task_lib
from dpdist.tasks.scoring import losses
from dpdist.tasks.scoring import metrics as metrics_lib

PyTree = Any

# Beyond, similarities overflow float32, or differ by less than it tells apart.
_TEMPERATURE = _validation.real(at_least=1e-4, at_most=1e4)


def contrastive(
  model: Any,
  *,
  target_model: Any = None,
  temperature: float = 0.1,
  similarity: str = "cosine",
  is_pair: str | None = None,
  negatives: str | None = None,
  **options: Unpack[build.Options],
) -> task_lib.Task:
  """Returns a task that embeds both items of a pair close to one another.

  An example holds several pairs of one unit of privacy, such as a user's views
  and clicks: inputs [pairs, ...] and targets [pairs, ...]. Pair i is to tell
  its own target from those of the example's other pairs, and from `negatives`,
  by InfoNCE (van den Oord et al. 2018). The loss is the mean over the pairs.

  Negatives never come from other examples of a batch, as they do without
  privacy. There an example has a part in the losses of all others, so that
  removing it changes all of their gradients. Clipping one gradient for each
  example does not bound that, and the guarantee would be void. Negatives that
  are public, such as a catalogue, may be in every example's `negatives`.

  Metrics: accuracy (how often a pair's own target is the most similar), loss
  and top5_accuracy (or another number).

  Args:
    model: maps one item of inputs to a vector; see `dpdist.tasks`.
    target_model: the same for targets and negatives, as in a two-tower
      recommender; None: `model`. With it, parameters are {"inputs", "targets"}.
    temperature: what similarities are divided by, from 1e-4 to 1e4.
    similarity: "cosine", or "dot" for the product of vectors.
    is_pair: the name of an array bool [pairs] that is False for padding; None:
      all are pairs.
    negatives: the name of an array [more, ...] of items like targets that are
      nobody's; None: there are none.
    **options: see `dpdist.tasks.Options`.
  """
  _validation.check("temperature", temperature, _TEMPERATURE)
  rule = _validation.one_of(("cosine", "dot"))
  _validation.check("similarity", similarity, rule)
  towers = _towers(model, target_model, options)
  parts = build.Parts(
    towers, options, "classes", ("accuracy", "loss"), can_collect=False
  )
  columns = parts.columns
  # By the part that they have, the names of an example's arrays.
  names = {"inputs": columns.inputs, "targets": columns.targets}
  if negatives is not None:
    names["negatives"] = negatives

  def prepare(
    example: Mapping[str, Any], rng: jax.Array | None
  ) -> tuple[dict[str, jax.Array], jax.Array]:
    del rng
    items = {part: jnp.asarray(example[name]) for part, name in names.items()}
    if is_pair is None:
      return items, jnp.ones(len(items["inputs"]), bool)
    return items, jnp.asarray(example[is_pair]) > 0

  def judged(
    found: Mapping[str, jax.Array], is_pair: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    return losses.pair_logits(
      found["inputs"],
      found["targets"],
      is_pair,
      temperature=temperature,
      is_cosine=similarity == "cosine",
      negatives=found.get("negatives"),
    )

  def check(task: task_lib.Task, example: Any, test: Any) -> None:
    columns_lib.check_arrays(columns, example, test)
    _check_pairs(names, is_pair, example, has_one_model=target_model is None)
    _check_vectors(parts, names, example)

  return build.make(
    parts, losses.cross_entropy, check=check, prepare=prepare, judged=judged
  )


def _check_pairs(
  names: Mapping[str, str],
  is_pair: str | None,
  example: Mapping[str, Any],
  *,
  has_one_model: bool,
) -> None:
  """Checks that an example has the arrays, of items that fit one another.

  Args:
    names: of its arrays, by the part that they have.
    is_pair: the name of one more.
    example: its arrays.
    has_one_model: whether inputs and targets have the same model.
  """
  needed = [*names.values()] + ([] if is_pair is None else [is_pair])
  if not set(needed) <= set(example):
    raise errors.ArgumentError(
      f"the training part must have columns {needed}, got {sorted(example)}"
    )
  shapes = {part: example[name].shape for part, name in names.items()}
  for part, name in names.items():
    _validation.require(
      len(shapes[part]) > 0, name, "an axis of items first", shapes[part]
    )
  num_pairs, *_ = shapes["inputs"]
  if shapes["targets"][0] != num_pairs:
    raise errors.ArgumentError(
      f"{names['inputs']}, {names['targets']} must have as many rows as an"
      f" example has pairs, got shapes {[shapes['inputs'], shapes['targets']]}"
    )
  if is_pair is not None and example[is_pair].shape != (num_pairs,):
    raise errors.ArgumentError(
      f"{is_pair} must say of each of the {num_pairs} pairs of an example"
      f" whether it is one, got shape {example[is_pair].shape}"
    )
  num_negatives = shapes.get("negatives", (0,))[0]
  if num_pairs < 1 or num_pairs + num_negatives < 2:
    raise errors.ArgumentError(
      f"{names['inputs']} must have 2 pairs or more in an example, or 1 and"
      " negatives, since the others are what a pair is told from, got"
      f" {num_pairs} and {num_negatives} negatives"
    )
  for part in ("negatives", "inputs")[: 1 + has_one_model]:
    if part in shapes and shapes[part][1:] != shapes["targets"][1:]:
      raise errors.ArgumentError(
        f"{names[part]} must have items of the shape of {names['targets']},"
        f" {shapes['targets'][1:]}, since one model takes both, got"
        f" {shapes[part][1:]}"
      )


def _check_vectors(
  parts: build.Parts, names: Mapping[str, str], example: Mapping[str, Any]
) -> None:
  """Checks that all items become vectors of one length."""
  towers, model_name = parts.model, parts.columns.name
  items = {
    part: jax.ShapeDtypeStruct(example[name].shape, example[name].dtype)
    for part, name in names.items()
  }
  lengths: dict[str, tuple[int, ...]] = {}
  for part, rows in items.items():

    def embed(items: Any, part: str = part) -> Any:
      params = towers.init(jax.random.key(0), items)
      return towers.apply(params, {part: items[part]}, None)[part]

    try:
      outputs = jax.eval_shape(embed, items)
    except Exception as error:
      # A model that gets items it does not take may raise nearly anything.
      raise errors.ArgumentError(
        f"{names[part]} must be items that {model_name} takes, got"
        f" {rows.dtype} {rows.shape[1:]}: {errors.in_a_line(error)}"
      ) from error
    if getattr(outputs, "ndim", 0) != 2:
      what = f"a {type(outputs).__name__}"
      if isinstance(outputs, jax.ShapeDtypeStruct):
        what = f"shape {outputs.shape[1:]}"
      raise errors.ArgumentError(
        f"{model_name} must map an item of {names[part]} to one vector, got"
        f" {what}"
      )
    lengths[names[part]] = outputs.shape[1:]
  if len({*lengths.values()}) > 1:
    raise errors.ArgumentError(
      "model and target_model must return vectors of one length, which are"
      f" multiplied, got {lengths}"
    )
  candidates = [x.shape[0] for part, x in items.items() if part != "inputs"]
  metrics_lib.check_top(parts.metrics.names, sum(candidates))


def _towers(
  model: Any, target_model: Any, options: build.Options
) -> model_lib.Model:
  """Returns a model of several items, by part, as one that maps each."""
  of = lambda model: model_lib.of(
    model,
    fix=options.get("fix", False),
    has_batch_axis=options.get("has_batch_axis", False),
  )
  first = of(model)
  try:
    second = None if target_model is None else of(target_model)
  except errors.ArgumentError as error:
    raise errors.ArgumentError(f"target_model: {error}") from error

  def tower(part: str) -> tuple[model_lib.Model, str]:
    if second is None or part == "inputs":
      return first, "inputs"
    return second, "targets"

  def own(params: PyTree, part: str) -> PyTree:
    return params if second is None else params[tower(part)[1]]

  def init(key: jax.Array, items: Mapping[str, jax.Array]) -> PyTree:
    if second is None:
      return first.init(key, items["inputs"][0])
    one, other = jax.random.split(key)
    return {
      "inputs": first.init(one, items["inputs"][0]),
      "targets": second.init(other, items["targets"][0]),
    }

  def apply(
    params: PyTree, items: Mapping[str, jax.Array], rng: jax.Array | None
  ) -> dict[str, jax.Array]:
    found = {}
    for i, (part, rows) in enumerate(items.items()):
      mapped = lambda row, key, part=part: tower(part)[0].apply(
        own(params, part), row, key
      )
      if rng is None:
        found[part] = jax.vmap(lambda row, f=mapped: f(row, None))(rows)
      else:
        keys = jax.random.split(jax.random.fold_in(rng, i), len(rows))
        found[part] = jax.vmap(mapped)(rows, keys)
    return found

  def findings(items: Mapping[str, jax.ShapeDtypeStruct]) -> list[Any]:
    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    found = first.findings(one(items["inputs"]))
    if second is not None:
      found += second.findings(one(items["targets"]))
    return found

  return model_lib.Model(
    name=first.name,
    init=init,
    apply=apply,
    findings=findings,
    changes=first.changes + (second.changes if second else ()),
    partitioning=first.partitioning + (second.partitioning if second else ()),
  )

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

PyTree = Any


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
    temperature: what similarities are divided by.
    similarity: "cosine", or "dot" for the product of vectors.
    is_pair: the name of an array bool [pairs] that is False for padding; None:
      all are pairs.
    negatives: the name of an array [more, ...] of items like targets that are
      nobody's; None: there are none.
    **options: see `dpdist.tasks.Options`.
  """
  _validation.check("temperature", temperature, _validation.real(above=0))
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
    more = [] if is_pair is None else [is_pair]
    _check_pairs([columns.inputs, columns.targets, *more], negatives, example)

  return build.make(
    parts, losses.cross_entropy, check=check, prepare=prepare, judged=judged
  )


def _check_pairs(
  names: list[str], negatives: str | None, example: Mapping[str, Any]
) -> None:
  """Checks that an example has the arrays, and as many rows in each."""
  given = [*names] + ([] if negatives is None else [negatives])
  if not set(given) <= set(example):
    raise errors.ArgumentError(
      f"the training part must have columns {given}, got {sorted(example)}"
    )
  shapes = {name: example[name].shape for name in names}
  lengths = {shape[:1] for shape in shapes.values()}
  if len(lengths) > 1 or () in lengths:
    raise errors.ArgumentError(
      f"{', '.join(names)} must have as many rows as an example has pairs, got"
      f" shapes {[*shapes.values()]}"
    )


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
  second = None if target_model is None else of(target_model)

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

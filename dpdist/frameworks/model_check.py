"""Finds what in a model is unsafe to train privately, before a step is spent.

    for finding in dpdist.check_model(
      model, loss_fn=loss_fn, params=params, batch=batch
    ):
      print(finding)

The loss is checked as a traced program, whatever framework it was written in.
The model is checked module by module, if its framework is known: Flax Linen,
Flax NNX, Equinox or Keras. None of them is imported for it.

`dpdist.tasks` runs it on their models before a run: findings that are faults
stop the run, the others are shown once.

An empty list is no proof. Only the clipping bounds an example's influence, as
it takes one example at a time. This check finds what would raise an error
there, or train badly without one.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import importlib
import sys
from typing import Any, Literal, NamedTuple, overload

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from dpdist import errors
from dpdist.clipping.trace import dependence

PyTree = Any

_MIXES = (
  "it normalises an example by statistics of the batch, so that a gradient"
  " depends on other examples, and keeps statistics that no noise covers"
)
KEEPS = "what it keeps of the examples would be released without noise"
# By framework: its class of modules, and what has `findings` on them.
_CHECKERS = (
  ("flax.linen", "Module", "dpdist.frameworks.linen"),
  ("flax.nnx", "Module", "dpdist.frameworks.nnx"),
  ("keras", "Layer", "dpdist.frontends.keras_model"),
  ("equinox", "Module", "dpdist.frameworks.equinox"),
)
_DRAWS = ("random_bits", "threefry2x32", "rng_bit_generator")


@dataclasses.dataclass(frozen=True)
class Finding:
  """One unsafe part of a model or loss.

  Attributes:
    what: what was found.
    where: its place in the model, its parameters or its loss.
    why: why it matters.
    instead: what would be right.
    is_fault: whether training must not begin; otherwise it may be meant.
  """

  what: str
  where: str
  why: str
  instead: str
  is_fault: bool = True

  def __str__(self) -> str:
    return f"{self.where}: {self.what}: {self.why}; instead: {self.instead}"


class Fixed(NamedTuple):
  """A model in which was replaced what could be.

  Attributes:
    model: the model, which is another one if anything was replaced.
    changes: what was done, a sentence each.
    findings: what is unsafe in it still.
  """

  model: Any
  changes: list[str]
  findings: list[Finding]


@overload
def check_model(
  model: Any = None,
  *inputs: Any,
  loss_fn: Callable[..., Any] | None = None,
  params: PyTree = None,
  batch: PyTree = None,
  rng: jax.Array | None = None,
  has_aux: bool = False,
  fix: Literal[False] = False,
) -> list[Finding]: ...


@overload
def check_model(
  model: Any,
  *inputs: Any,
  loss_fn: Callable[..., Any] | None = None,
  params: PyTree = None,
  batch: PyTree = None,
  rng: jax.Array | None = None,
  has_aux: bool = False,
  fix: Literal[True],
) -> Fixed: ...


def check_model(
  model: Any = None,
  *inputs: Any,
  loss_fn: Callable[..., Any] | None = None,
  params: PyTree = None,
  batch: PyTree = None,
  rng: jax.Array | None = None,
  has_aux: bool = False,
  fix: bool = False,
) -> list[Finding] | Fixed:
  """Lists what is unsafe in a model, in its loss, or in both.

  Args:
    model: a module of Flax Linen, Flax NNX, Equinox or Keras. None: only the
      loss is checked.
    *inputs: arguments of a Linen module for one example, since it can only be
      checked in a call; shapes are enough. Other modules need none.
    loss_fn: (params, example[, rng]) -> loss, for `dpdist.clipped_grad`. None:
      only the model is checked.
    params: with loss_fn, the initial parameters.
    batch: with loss_fn, some examples; only their shapes matter.
    rng: with loss_fn, a PRNG key if it takes one.
    has_aux: whether loss_fn returns (loss, aux).
    fix: whether to replace batch norm by group norm, whose initial scale is 1
      and shift 0: any layer of an NNX or Equinox module whose features are
      where group norm has them, and of a Linen module what an attribute holds
      as a class. It takes a batch axis where batch norm does. Keras models must
      be changed by hand.

  Returns:
    Findings; none if nothing was found. With `fix`, a `Fixed`: the model as it
    is then, what was done, and the findings on it.

  Raises:
    ValueError: there is nothing to check, or nothing to fix.
  """
  if model is None and loss_fn is None:
    raise errors.ArgumentError("model or loss_fn must be given, got neither")
  changes: list[str] = []
  if fix:
    model, changes = _fixed(model)
  found: list[Finding] = []
  if model is not None:
    found += _of_module(model, inputs, is_alone=loss_fn is None)
  if loss_fn is not None:
    found += of_params(params)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    example = jax.tree.map(shape, jax.tree.map(jnp.asarray, batch))
    found += of_loss(loss_fn, params, example, rng, has_aux=has_aux)
  found = list(dict.fromkeys(found))
  return Fixed(model, changes, found) if fix else found


def of_params(params: PyTree) -> Iterator[Finding]:
  """Yields findings on values: what is no number, or not finite."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    where = f"params{jax.tree_util.keystr(path)}"
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      yield Finding(
        f"parameters of dtype {dtype}",
        where,
        "nothing can be differentiated by them",
        "let loss_fn close over them, or pass them as frozen",
      )
    elif not isinstance(leaf, jax.ShapeDtypeStruct) and not np.all(
      np.isfinite(np.asarray(leaf, np.float64))
    ):
      yield Finding(
        "initial values that are not finite",
        where,
        "every gradient would be non-finite, and contribute nothing",
        "initialise with finite numbers",
      )


def of_loss(
  loss_fn: Callable[..., Any],
  params: PyTree,
  example: PyTree,
  rng: jax.Array | None,
  *,
  has_aux: bool,
) -> Iterator[Finding]:
  """Yields findings on a loss of one example, of which shapes are enough."""
  arguments = (params, example) if rng is None else (params, example, rng)
  try:
    closed, out = jax.make_jaxpr(loss_fn, return_shape=True)(*arguments)
  except NameError as error:
    if "axis name" not in str(error):
      raise
    yield Finding(
      f"a named axis over examples ({error})", "loss_fn", _MIXES, "group norm"
    )
    return
  except Exception as error:
    # Flax's and Equinox's own errors; each framework has another class.
    if "trace" not in str(error).lower():
      raise
    yield Finding(
      f"state that changes inside the loss ({str(error).splitlines()[0]})",
      "loss_fn",
      KEEPS,
      "a loss that gets parameters, example and rng as arguments, such as"
      " per_example_loss of dpdist.frontends",
    )
    return
  loss = out[0] if has_aux else out
  if getattr(loss, "shape", None) != () or not jnp.issubdtype(
    loss.dtype, jnp.floating
  ):
    yield Finding(
      "no single floating number",
      "loss_fn",
      "a loss is one number for one example",
      "take the mean over what belongs to the example",
    )
    return
  yield from _of_program(closed.jaxpr, params, rng)


def _of_program(
  jaxpr: Any, params: PyTree, rng: jax.Array | None
) -> Iterator[Finding]:
  num_inputs = len(jaxpr.invars)
  paths = jax.tree_util.tree_leaves_with_path(params)
  for i, (path, _) in enumerate(paths):
    if not dependence.dependent(jaxpr, [j == i for j in range(num_inputs)])[0]:
      yield Finding(
        "parameters that no example touches",
        f"params{jax.tree_util.keystr(path)}",
        "their gradient is always 0, and each step adds noise to them",
        "leave them out, or pass them as frozen",
        is_fault=False,
      )
  first = num_inputs if rng is None else num_inputs - 1
  marked = [i >= first for i in range(num_inputs)]
  if _draws(jaxpr) and not (
    rng is not None and dependence.dependent(jaxpr, marked)[0]
  ):
    yield Finding(
      "random numbers that do not come from the loss's rng",
      "loss_fn",
      "they are the same for every example and at every step, which is right"
      " for fixed features and wrong for dropout",
      "loss_fn(params, example, rng), with all randomness from rng",
      is_fault=False,
    )


def _draws(jaxpr: Any) -> bool:
  return any(
    eqn.primitive.name in _DRAWS
    or any(_draws(inner) for inner in core.jaxprs_in_params(eqn.params))
    for eqn in jaxpr.eqns
  )


def _of_module(
  model: Any, inputs: tuple[Any, ...], *, is_alone: bool
) -> Iterator[Finding]:
  checker = _checker(model)
  if checker is None:
    raise errors.ArgumentError(
      "model must be a module of Flax Linen, Flax NNX, Equinox or Keras, got a"
      f" {type(model).__name__}: pass a plain function as loss_fn"
    )
  found: Iterator[Finding] = checker.findings(model, inputs, is_alone=is_alone)
  return found


def _checker(model: Any) -> Any:
  """Returns our module for a model's framework, or None."""
  for framework, kind, checker in _CHECKERS:
    # A module's framework has been imported by now.
    if framework in sys.modules and isinstance(
      model, getattr(sys.modules[framework], kind)
    ):
      return importlib.import_module(checker)
  return None


def _fixed(model: Any) -> tuple[Any, list[str]]:
  replaced = getattr(_checker(model), "replaced", None)
  if replaced is None:
    raise errors.ArgumentError(
      "fix must be False for all but modules of Flax Linen, Flax NNX and"
      f" Equinox, got True for a {type(model).__name__}"
    )
  fixed: tuple[Any, list[str]] = replaced(model)
  return fixed


def batch_norm(name: str, where: str, instead: str) -> Finding:
  """Returns the finding of a layer that normalises over the batch."""
  return Finding(name, where, _MIXES, instead)


def refuse_unsafe(found: Iterable[Finding]) -> None:
  """Raises ArgumentError with all findings, if there are any."""
  listed = "; ".join(map(str, found))
  if listed:
    raise errors.ArgumentError(
      f"model must be safe to train privately, got {listed}"
    )

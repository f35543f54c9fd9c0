"""Finds which mesh axes a value varies over inside `jax.shard_map`.

Inside shard_map, JAX inserts a sum over the mesh into the gradient of every
value that is the same on all devices ("unvarying"). For per-example gradients
that sum would come before clipping, and an example would move the clipped sum
by many times the clip norm, without an error. Casting the parameters to
varying first keeps each device's gradients separate.
"""

from typing import Any

import jax

PyTree = Any

# Primitives that name mesh axes but send nothing along them.
_NOT_COLLECTIVE = ("pvary", "pcast", "axis_index", "reduced_vary_cast")


def varying_axes(tree: PyTree) -> frozenset[str]:
  """Returns the mesh axes that any leaf of tree varies over; empty outside."""
  axes: frozenset[str] = frozenset()
  for leaf in jax.tree.leaves(tree):
    axes |= _axes(jax.typeof(leaf))
  return axes


def divided_axes(tree: PyTree) -> frozenset[str]:
  """Returns the mesh axes along which tree may be divided; empty outside."""
  axes = varying_axes(tree)
  return axes | untold_axes(axes)


def untold_axes(axes: frozenset[str]) -> frozenset[str]:
  """Returns all manual axes if axes is empty, since then nothing is known.

  With check_vma=False no value says what it varies over, and a batch may be
  divided along any of them.
  """
  if axes:
    return frozenset()
  return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def is_divided_explicitly(x: Any) -> bool:
  """Returns whether x's type names mesh axes, as with Explicit axes."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  return sharding is not None and any(sharding.spec)


def abstract_varying_axes(tree: PyTree) -> frozenset[str]:
  """Returns the axes that any `jax.ShapeDtypeStruct` of tree varies over."""
  axes: frozenset[str] = frozenset()
  for leaf in jax.tree.leaves(tree):
    axes |= _axes(leaf)
  return axes


def collective_over(jaxpr: Any, axes: frozenset[str]) -> str | None:
  """Returns the name of a primitive within that sends along axes, or None."""
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    along = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    along = set(along) if isinstance(along, tuple | list) else {along}
    if along & axes and name not in _NOT_COLLECTIVE:
      return name
    for sub in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(sub, "jaxpr", sub)
      inner_name = hasattr(inner, "eqns") and collective_over(inner, axes)
      if inner_name:
        return inner_name
  return None


def axes_in(jaxpr: Any) -> frozenset[str]:
  """Returns the mesh axes that any value computed in jaxpr varies over."""
  axes: frozenset[str] = frozenset()
  for eqn in jaxpr.eqns:
    for out in eqn.outvars:
      axes |= _axes(out.aval)
  return axes


def cast_to_varying(tree: PyTree, axes: frozenset[str]) -> PyTree:
  """Casts each leaf to vary over axes too; values do not change."""

  def cast(leaf: Any) -> jax.Array:
    missing = tuple(sorted(axes - _axes(jax.typeof(leaf))))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(cast, tree)


def _axes(aval: Any) -> frozenset[str]:
  # The attribute's name differs between releases of JAX.
  manual = getattr(aval, "manual_axis_type", None)
  if manual is not None:
    return frozenset(manual.varying)
  return frozenset(getattr(aval, "vma", None) or ())

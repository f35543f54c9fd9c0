"""Per-example gradients of convolution kernels, and their norms.

The gradient of a kernel at offset k is the product of the output's gradient
with the input shifted by k. Three ways lead to the norm:

* `instantiate` forms the gradient from shifted views of the input, a matrix
  product for each offset. XLA's own way, a grouped convolution with a group for
  each example, is several times dearer on every backend.
* `squared_norm` never forms it: the inner products of all pairs of positions
  are summed along the diagonals that the offsets mark. For few positions and
  many channels this is far cheaper.

Any stride, dilation, padding and number of groups, and any number of axes.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist.clipping import factors
from dpdist.clipping.program import Site

# With fewer channels, a product for each offset is faster than one for all.
_MIN_CHANNELS = 8


class Sizes(NamedTuple):
  """Of one example.

  Attributes:
    padded: positions of the input, padding and holes included.
    positions: of the output.
    offsets: of the kernel.
    groups: of channels.
    inputs: channels of the input in a group.
    outputs: channels of the output in a group.
  """

  padded: int
  positions: int
  offsets: int
  groups: int
  inputs: int
  outputs: int


class _Geometry(NamedTuple):
  """Static facts of a convolution; one entry an axis of space."""

  lhs: tuple[int, ...]
  rhs: tuple[int, ...]
  out: tuple[int, ...]
  kernel: tuple[int, ...]
  padding: tuple[tuple[int, int, int], ...]
  strides: tuple[int, ...]
  dilation: tuple[int, ...]
  output: tuple[int, ...]
  groups: int


def _geometry(site: Site) -> _Geometry:
  params = site.eqn.params
  numbers = params["dimension_numbers"]
  kernel = site.eqn.invars[1].aval.shape
  out = site.eqn.outvars[0].aval.shape
  return _Geometry(
    numbers.lhs_spec,
    numbers.rhs_spec,
    numbers.out_spec,
    tuple(kernel[a] for a in numbers.rhs_spec[2:]),
    tuple(
      (low, high, holes - 1)
      for (low, high), holes in zip(
        params["padding"], params["lhs_dilation"], strict=True
      )
    ),
    tuple(params["window_strides"]),
    tuple(params["rhs_dilation"]),
    tuple(out[a] for a in numbers.out_spec[2:]),
    params["feature_group_count"],
  )


def sizes(site: Site) -> Sizes:
  """The sizes that costs depend on."""
  g = _geometry(site)
  lhs = site.eqn.invars[0].aval.shape
  out = site.eqn.outvars[0].aval.shape
  rows = lhs[g.lhs[0]]
  padded = rows * math.prod(
    max(0, low + high + lhs[a] + max(0, lhs[a] - 1) * holes)
    for a, (low, high, holes) in zip(g.lhs[2:], g.padding, strict=True)
  )
  return Sizes(
    padded,
    rows * math.prod(g.output),
    math.prod(g.kernel),
    g.groups,
    lhs[g.lhs[1]] // g.groups,
    out[g.out[1]] // g.groups,
  )


def _arrange(
  g: _Geometry, x: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Rows, space, groups, channels; the input with padding and holes."""
  space = g.lhs[2:]
  x = jnp.transpose(x, (g.lhs[0], *space, g.lhs[1]))
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *g.padding, (0, 0, 0)))
  x = x.reshape(*x.shape[:-1], g.groups, -1)
  cotangent = jnp.transpose(cotangent, (g.out[0], *g.out[2:], g.out[1]))
  return x, cotangent.reshape(*cotangent.shape[:-1], g.groups, -1)


def _window(
  g: _Geometry, x: jax.Array, offset: tuple[int, ...], axis: int
) -> jax.Array:
  """The entries of x that an offset of the kernel meets, from an axis on."""
  index = [slice(None)] * axis
  for k, step, d, n in zip(
    offset, g.strides, g.dilation, g.output, strict=False
  ):
    index.append(slice(k * d, k * d + (n - 1) * step + 1, step))
  return x[tuple(index)]


def _offsets(g: _Geometry) -> list[tuple[int, ...]]:
  return list(itertools.product(*map(range, g.kernel)))


def instantiate(site: Site, x: jax.Array, cotangent: jax.Array) -> jax.Array:
  """The gradient of the kernel for one example.

  Args:
    site: a conv_general_dilated.
    x: the input, without loops.
    cotangent: of the output.

  Returns:
    Shaped like the kernel, float32 or wider.
  """
  g = _geometry(site)
  x, cotangent = _arrange(g, x, cotangent)
  precision = site.eqn.params["precision"]
  if x.shape[-1] >= _MIN_CHANNELS and all(n == 1 for n in g.strides[:-1]):
    return _as_kernel(g, _by_both_sides(g, x, cotangent, precision))
  return _as_kernel(g, _by_rows(g, x, cotangent, precision))


def _by_rows(
  g: _Geometry, x: jax.Array, cotangent: jax.Array, precision: Any
) -> jax.Array:
  """A product for each offset on all axes but the last."""
  inputs = _last_axis_shifted(g, x)
  inputs = inputs.reshape(*inputs.shape[:-2], -1)
  grads = []
  for k in itertools.product(*map(range, g.kernel[:-1])):
    grads.append(_outer(_window(g, inputs, k, 1), cotangent, precision))
  grad = jnp.stack(grads).reshape(
    *g.kernel[:-1], g.groups, g.kernel[-1], -1, grads[0].shape[-1]
  )
  return jnp.moveaxis(grad, -3, len(g.kernel) - 1)


def _last_axis_shifted(g: _Geometry, x: jax.Array) -> jax.Array:
  """Rows, space, groups, last offset, channels: the input as each offset of the
  last axis meets it."""
  step, dilation, width = g.strides[-1], g.dilation[-1], g.output[-1]
  ndim = len(g.kernel)
  return jnp.stack(
    [
      jax.lax.slice_in_dim(
        x, j * dilation, j * dilation + (width - 1) * step + 1, step, axis=ndim
      )
      for j in range(g.kernel[-1])
    ],
    axis=-2,
  )


def _by_both_sides(
  g: _Geometry, x: jax.Array, cotangent: jax.Array, precision: Any
) -> jax.Array:
  """One large product: the last axis of space is shifted on the input's side,
  the others on the output's. [*kernel, groups, inputs, outputs]."""
  last, others = g.kernel[-1], g.kernel[:-1]
  ndim = len(g.kernel)
  inputs = _last_axis_shifted(g, x)
  room = x.shape[1:ndim]
  shifts = list(itertools.product(*map(range, others)))
  outputs = jnp.stack(
    [
      jnp.pad(
        cotangent,
        [
          (0, 0),
          *(
            (k * d, size - n - k * d)
            for k, d, size, n in zip(
              shift, g.dilation[:-1], room, g.output[:-1], strict=True
            )
          ),
          *[(0, 0)] * 3,
        ],
      )
      for shift in shifts
    ],
    axis=-2,
  )
  flat = lambda y: y.reshape(-1, g.groups, math.prod(y.shape[-2:]))
  grad = _outer(flat(inputs), flat(outputs), precision)
  grad = grad.reshape(g.groups, last, x.shape[-1], *others, -1)
  # To the other offsets, the last one, groups, inputs, outputs.
  return jnp.transpose(
    grad, (*range(3, 3 + len(others)), 1, 0, 2, 3 + len(others))
  )


def _outer(x: jax.Array, cotangent: jax.Array, precision: Any) -> jax.Array:
  """Sums over all but groups and channels: [groups, inputs, outputs]."""
  groups, inputs = x.shape[-2:]
  outputs = cotangent.shape[-1]
  wide = jnp.promote_types(x.dtype, jnp.float32)
  if groups == 1:  # An axis in the middle would cost a copy.
    x, cotangent = x.reshape(-1, inputs), cotangent.reshape(-1, outputs)
    form = "ti,to->io"
  else:
    x = x.reshape(-1, groups, inputs)
    cotangent = cotangent.reshape(-1, groups, outputs)
    form = "tgi,tgo->gio"
  grad = jnp.einsum(
    form, x, cotangent, precision=precision, preferred_element_type=wide
  )
  return grad.reshape(groups, inputs, outputs)


def _as_kernel(g: _Geometry, grad: jax.Array) -> jax.Array:
  """From [*kernel, groups, inputs, outputs] to the kernel's own axes."""
  ndim = len(g.kernel)
  # Kernel axes: outputs of all groups, inputs of one, space.
  grad = jnp.transpose(grad, (ndim, ndim + 2, ndim + 1, *range(ndim)))
  grad = grad.reshape(-1, *grad.shape[2:])
  inverse = [g.rhs.index(a) for a in range(ndim + 2)]
  return jnp.transpose(grad, inverse)


def patches(site: Site, x: jax.Array, cotangent: jax.Array) -> factors.Dense:
  """The convolution as a dense product of patches; for one example.

  Returns:
    Factors whose S are the groups and whose rows are patches of the input.
  """
  g = _geometry(site)
  x, cotangent = _arrange(g, x, cotangent)
  rows = jnp.concatenate([_window(g, x, k, 1) for k in _offsets(g)], axis=-1)
  by_group = lambda y: jnp.moveaxis(y.reshape(-1, g.groups, y.shape[-1]), 1, 0)
  return factors.Dense(by_group(rows), by_group(cotangent))


def squared_norm(site: Site, x: jax.Array, cotangent: jax.Array) -> jax.Array:
  """The squared norm of that gradient, never much too small (`factors`)."""
  g = _geometry(site)
  precision = site.eqn.params["precision"]
  x, cotangent = _arrange(g, x, cotangent)
  wide = jnp.promote_types(x.dtype, jnp.float32)

  def gram(y: jax.Array) -> jax.Array:
    space = y.shape[:-2]
    y = y.reshape(-1, *y.shape[-2:])
    pairs = jnp.einsum(
      "tgi,ugi->gtu",
      y,
      y,
      precision=precision,
      preferred_element_type=wide,
    )
    return pairs.reshape(g.groups, *space, *space)

  axes = x.ndim - 2
  pairs = gram(x)
  windows = jnp.zeros((g.groups, *(cotangent.shape[:-2] * 2)), wide)
  for k in _offsets(g):
    shifted = _window(g, pairs, k, 2)
    windows = windows + _window(g, shifted, k, 2 + axes)
  outs = gram(cotangent)
  square = jnp.sum(windows * outs)
  positions = math.prod(cotangent.shape[:-2])
  diagonal = lambda z: jnp.maximum(
    jnp.diagonal(z.reshape(g.groups, positions, positions), axis1=1, axis2=2), 0
  )
  terms = jnp.sum(jnp.sqrt(diagonal(windows) * diagonal(outs)), axis=-1)
  return jnp.maximum(square, factors.TRUSTED * jnp.sum(jnp.square(terms)))

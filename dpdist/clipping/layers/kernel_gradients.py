"""Per-example gradients of convolution kernels, and their norms.

The gradient of a kernel at offset k is the product of the output's gradient
with the input shifted by k. There are three ways to the norm:

* `instantiate` forms the gradient. On a CPU or GPU it uses matrix products of
  shifted views of the input, since XLA's own way, a grouped convolution with a
  group for each example, is several times slower there. On a TPU it uses one
  convolution for all examples, which reads each operand once.
* `patches` treats the convolution as a dense layer, whose norms need no
  gradient.
* `pixels.norm` does not form the gradient either.

They take any stride, dilation, padding, number of groups and number of axes.
"""

from collections.abc import Callable
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpdist.clipping.layers import factors
from dpdist.clipping.trace import program
from dpdist.clipping.trace import varying_axes
from dpdist.clipping.trace.program import WeightUse

# With fewer channels, a product for each offset is faster than one for all.
_MIN_CHANNELS = 8
# A TPU's compiler turns fewer groups than this into one dense convolution, with
# as many times the arithmetic. With more groups, and few channels, a grouped
# convolution moves the fewest bytes.
_MIN_GROUPS = 128
_MOST_GROUPED_CHANNELS = 32


class Sizes(NamedTuple):
  """Sizes of a convolution for one example."""

  padded: int  # Positions of the input, padding and holes included.
  positions: int  # Positions of the output.
  offsets: int  # Offsets of the kernel.
  groups: int  # Groups of channels.
  inputs: int  # Channels of the input in a group.
  outputs: int  # Channels of the output in a group.
  phases: int  # Phases into which the strides sort the pixels.
  cells: int  # Padded positions in a phase.


class Geometry(NamedTuple):
  """Static parameters of a convolution; one entry for each axis of space."""

  lhs: tuple[int, ...]
  rhs: tuple[int, ...]
  out: tuple[int, ...]
  kernel: tuple[int, ...]
  padding: tuple[tuple[int, int, int], ...]
  strides: tuple[int, ...]
  dilation: tuple[int, ...]
  output: tuple[int, ...]
  groups: int


def geometry(use: WeightUse) -> Geometry:
  params = use.eqn.params
  numbers = params["dimension_numbers"]
  kernel = use.eqn.invars[1].aval.shape
  out = use.eqn.outvars[0].aval.shape
  return Geometry(
    lhs=numbers.lhs_spec,
    rhs=numbers.rhs_spec,
    out=numbers.out_spec,
    kernel=tuple(kernel[a] for a in numbers.rhs_spec[2:]),
    padding=tuple(
      (low, high, holes - 1)
      for (low, high), holes in zip(
        params["padding"], params["lhs_dilation"], strict=True
      )
    ),
    strides=tuple(params["window_strides"]),
    dilation=tuple(params["rhs_dilation"]),
    output=tuple(out[a] for a in numbers.out_spec[2:]),
    groups=params["feature_group_count"],
  )


def sizes(use: WeightUse) -> Sizes:
  """Returns the sizes that costs depend on."""
  g = geometry(use)
  lhs = use.eqn.invars[0].aval.shape
  out = use.eqn.outvars[0].aval.shape
  rows = lhs[g.lhs[0]]
  space = [
    max(0, low + high + lhs[a] + max(0, lhs[a] - 1) * holes)
    for a, (low, high, holes) in zip(g.lhs[2:], g.padding, strict=True)
  ]
  cells = [-(-n // step) for n, step in zip(space, g.strides, strict=True)]
  return Sizes(
    padded=rows * math.prod(space),
    positions=rows * math.prod(g.output),
    offsets=math.prod(g.kernel),
    groups=g.groups,
    inputs=lhs[g.lhs[1]] // g.groups,
    outputs=out[g.out[1]] // g.groups,
    phases=math.prod(g.strides),
    cells=rows * math.prod(cells),
  )


def arrange(
  g: Geometry, x: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Arranges both as [rows, *space, groups, channels], and pads the input."""
  space = g.lhs[2:]
  x = jnp.transpose(x, (g.lhs[0], *space, g.lhs[1]))
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *g.padding, (0, 0, 0)))
  x = x.reshape(*x.shape[:-1], g.groups, -1)
  cotangent = jnp.transpose(cotangent, (g.out[0], *g.out[2:], g.out[1]))
  return x, cotangent.reshape(*cotangent.shape[:-1], g.groups, -1)


def _window(
  g: Geometry, x: jax.Array, offset: tuple[int, ...], axis: int
) -> jax.Array:
  """Returns the entries of x that an offset meets, space from an axis on."""
  index = [slice(None)] * axis
  for k, step, d, n in zip(
    offset, g.strides, g.dilation, g.output, strict=False
  ):
    index.append(slice(k * d, k * d + (n - 1) * step + 1, step))
  return x[tuple(index)]


def instantiate(
  use: WeightUse, x: jax.Array, cotangent: jax.Array, platform: str
) -> jax.Array:
  """Computes the gradient of the kernel for one example, without loops."""
  if platform == "tpu":
    return _by_convolution(use)(x[None], cotangent[None])[0]
  g = geometry(use)
  x, cotangent = arrange(g, x, cotangent)
  precision = use.eqn.params["precision"]
  if x.shape[-1] >= _MIN_CHANNELS and all(n == 1 for n in g.strides[:-1]):
    return _as_kernel(g, _by_both_sides(g, x, cotangent, precision))
  return _as_kernel(g, _by_rows(g, x, cotangent, precision))


def _by_convolution(
  use: WeightUse,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Uses one convolution for all examples, which reads each operand once.

  Returns a function from inputs and gradients of the output, [N, ...], to
  gradients of the kernel, [N, ...]. Under vmap N grows, where JAX's own rule
  would make groups of channels.
  """
  g = geometry(use)
  channels = use.eqn.invars[0].aval.shape[g.lhs[1]] // g.groups

  @jax.custom_batching.custom_vmap
  def gradients(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    if x.shape[0] >= _MIN_GROUPS and channels <= _MOST_GROUPED_CHANNELS:
      return jax.vmap(functools.partial(_by_groups, use))(x, cotangent)
    return _by_axis_of_space(use, x, cotangent)

  @gradients.def_vmap
  def batched(
    size: int, in_batched: list[bool], *args: jax.Array
  ) -> tuple[jax.Array, bool]:
    flat = [
      (y if own else jnp.broadcast_to(y, (size, *y.shape))).reshape(
        -1, *y.shape[2 if own else 1 :]
      )
      for own, y in zip(in_batched, args, strict=True)
    ]
    out = gradients(*flat)
    return out.reshape(size, -1, *out.shape[1:]), True

  return gradients


def _by_groups(use: WeightUse, x: jax.Array, cotangent: jax.Array) -> jax.Array:
  """Computes JAX's own gradient: under vmap it has a group for each example."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  kernel = varying_axes.cast_to_varying(
    jnp.zeros(use.eqn.invars[1].aval.shape, wide),
    varying_axes.varying_axes((x, cotangent)),
  )
  run = lambda kernel: program.bind(
    use.eqn, [x.astype(wide), kernel], preferred_element_type=wide
  )[0]
  return jax.vjp(run, kernel)[1](cotangent.astype(wide))[0]


def _by_axis_of_space(
  use: WeightUse, x: jax.Array, cotangent: jax.Array
) -> jax.Array:
  """Computes a convolution with the output's gradients as its kernel.

  The examples are one more axis of space, with holes and a stride such that
  each meets only itself. This is how XLA expresses a batched matrix product for
  a TPU's matrix unit.
  """
  g = geometry(use)
  size, ndim = x.shape[0], len(g.kernel)
  dtype = jnp.promote_types(x.dtype, cotangent.dtype)
  x, cotangent = x.astype(dtype), cotangent.astype(dtype)
  along = lambda axes: [a + 1 for a in axes]
  # To [channels of one group, examples, *space, groups and rows].
  x = jnp.transpose(x, (*along(g.lhs), 0))
  x = x.reshape(x.shape[0], g.groups, -1, *x.shape[2:])
  x = jnp.transpose(x, (2, 3 + ndim, *range(3, 3 + ndim), 1, 0))
  x = x.reshape(*x.shape[:-2], -1)
  # To [examples, *space, rows, channels of all groups].
  cotangent = jnp.transpose(
    cotangent, (0, *along(g.out[2:]), *along((g.out[0], g.out[1])))
  )
  padding = []
  for a in range(ndim):
    low, _, holes = g.padding[a]
    n = x.shape[2 + a] + max(0, x.shape[2 + a] - 1) * holes
    span = (g.kernel[a] - 1) * g.dilation[a]
    span += (g.output[a] - 1) * g.strides[a] + 1
    padding.append((low, span - low - n))
  space = tuple(range(1, 2 + ndim))
  grad = jax.lax.conv_general_dilated(
    x,
    cotangent,
    window_strides=(max(1, size - 1), *g.dilation),
    padding=[(0, 0), *padding],
    lhs_dilation=(size, *(holes + 1 for _, _, holes in g.padding)),
    rhs_dilation=(1, *g.strides),
    dimension_numbers=jax.lax.ConvDimensionNumbers(
      (0, 2 + ndim, *space),
      (2 + ndim, 1 + ndim, *range(1 + ndim)),
      (0, 2 + ndim, *space),
    ),
    feature_group_count=g.groups,
    precision=use.eqn.params["precision"],
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )
  # From [inputs, examples, *kernel, outputs] to the kernel's own axes.
  grad = jnp.transpose(grad, (1, 2 + ndim, 0, *range(2, 2 + ndim)))
  inverse = [g.rhs.index(a) for a in range(ndim + 2)]
  return jnp.transpose(grad, (0, *along(inverse)))


def _by_rows(
  g: Geometry, x: jax.Array, cotangent: jax.Array, precision: Any
) -> jax.Array:
  """Computes a product for each offset on all axes but the last."""
  inputs = _last_axis_shifted(g, x)
  inputs = inputs.reshape(*inputs.shape[:-2], -1)
  grads = []
  for k in itertools.product(*map(range, g.kernel[:-1])):
    grads.append(_outer(_window(g, inputs, k, 1), cotangent, precision))
  grad = jnp.stack(grads).reshape(
    *g.kernel[:-1], g.groups, g.kernel[-1], -1, grads[0].shape[-1]
  )
  return jnp.moveaxis(grad, -3, len(g.kernel) - 1)


def _last_axis_shifted(g: Geometry, x: jax.Array) -> jax.Array:
  """Returns the input as each offset of the last axis of space meets it.

  Its axes are [rows, *space, groups, last offset, channels].
  """
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
  g: Geometry, x: jax.Array, cotangent: jax.Array, precision: Any
) -> jax.Array:
  """Computes one large product, [*kernel, groups, inputs, outputs].

  It shifts the input along the last axis of space, and the output along others.
  """
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
  # To [*other offsets, last offset, groups, inputs, outputs].
  return jnp.transpose(
    grad, (*range(3, 3 + len(others)), 1, 0, 2, 3 + len(others))
  )


def _outer(x: jax.Array, cotangent: jax.Array, precision: Any) -> jax.Array:
  """Sums over all axes but groups and channels: [groups, inputs, outputs]."""
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


def _as_kernel(g: Geometry, grad: jax.Array) -> jax.Array:
  """Moves [*kernel, groups, inputs, outputs] to the kernel's own axes."""
  ndim = len(g.kernel)
  # To [outputs of all groups, inputs of one group, *space].
  grad = jnp.transpose(grad, (ndim, ndim + 2, ndim + 1, *range(ndim)))
  grad = grad.reshape(-1, *grad.shape[2:])
  inverse = [g.rhs.index(a) for a in range(ndim + 2)]
  return jnp.transpose(grad, inverse)


def patches(
  use: WeightUse, x: jax.Array, cotangent: jax.Array
) -> factors.Dense:
  """Returns one example's convolution as a dense product of patches.

  Its S are the groups, and its rows are patches of the input.
  """
  g = geometry(use)
  x, cotangent = arrange(g, x, cotangent)
  offsets = itertools.product(*map(range, g.kernel))
  rows = jnp.concatenate([_window(g, x, k, 1) for k in offsets], axis=-1)
  by_group = lambda y: jnp.moveaxis(y.reshape(-1, g.groups, y.shape[-1]), 1, 0)
  return factors.Dense(by_group(rows), by_group(cotangent))

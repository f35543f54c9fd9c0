"""Random changes of an image that keep its class."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from dpdist import _validation


def flip_and_crop(
  *, flip: bool, crop: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Makes a function that randomly changes one image.

  It maps (key, image [height, width, channels]) to an image of that shape. If
  `flip`, it mirrors left and right with probability 1/2. It shifts by at most
  `crop` pixels each way; the image's own reflection fills the border.
  """

  def change(key: jax.Array, image: jax.Array) -> jax.Array:
    flip_key, crop_key = jax.random.split(key)
    if flip:
      is_flipped = jax.random.bernoulli(flip_key)
      image = jnp.where(is_flipped, image[:, ::-1], image)
    if crop:
      padded = jnp.pad(
        image, ((crop, crop), (crop, crop), (0, 0)), mode="reflect"
      )
      down, right = jax.random.randint(crop_key, (2,), 0, 2 * crop + 1)
      image = jax.lax.dynamic_slice(padded, (down, right, 0), image.shape)
    return image

  return change


def check(config: ml_collections.ConfigDict, shape: tuple[int, ...]) -> None:
  """Raises ValueError for an augmentation of such inputs that has no effect."""
  wanted = config.augmentation
  _validation.require(
    wanted.multiplicity >= 0,
    "augmentation.multiplicity",
    "at least 0",
    wanted.multiplicity,
  )
  if not wanted.multiplicity:
    if wanted.flip or wanted.crop:
      raise ValueError(
        "augmentation.multiplicity must be at least 1 with augmentation.flip="
        f"{wanted.flip} and augmentation.crop={wanted.crop}, got 0"
      )
    return
  if len(shape) != 3 or config.data.features:
    raise ValueError(
      "augmentation.multiplicity must be 0 unless inputs are images (height,"
      f" width, channels), got {wanted.multiplicity} for inputs {shape} of"
      f" data.features={config.data.features!r}"
    )
  if not 0 <= wanted.crop < min(shape[:2]):
    raise ValueError(
      f"augmentation.crop must be at least 0 and below {min(shape[:2])}, the"
      f" images' size, got {wanted.crop}"
    )

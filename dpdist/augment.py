"""Random changes of an image that leave its class."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def flip_and_crop(
  *, flip: bool, crop: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Makes a random change of one image.

  Args:
    flip: mirrors left and right, in one half of the cases.
    crop: shifts by up to so many pixels each way; what comes in is the image's
      own reflection.

  Returns:
    A function (key, image [height, width, channels]) -> an image of that shape.
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

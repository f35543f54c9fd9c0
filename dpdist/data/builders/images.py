"""Images in files, decoded when they are read."""

from collections.abc import Sequence
import hashlib
import os
import pathlib
from typing import Any, Unpack

import numpy as np

from dpdist import errors
from dpdist.data import dataset
from dpdist.data import sources
from dpdist.data.builders import memory
from dpdist.data.builders import options as options_lib
from dpdist.data.builders import split
from dpdist.data.builders import table as table_lib

_SUFFIXES = frozenset(
  [
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
  ]
)


class ImageTable:
  """Rows of a file's contents and what is known of it; see `table.Table`.

  `known` has, by column, what is known of each image, and `image` is the name
  of the column of contents.
  """

  block_rows = 64

  def __init__(
    self, files: Sequence[str], known: memory.MemoryTable | None, image: str
  ):
    self.files = files
    self._known, self._image = known, image
    self.columns = [image, *(known.columns if known else [])]

  def __len__(self) -> int:
    return len(self.files)

  def read(
    self, indices: np.ndarray, columns: Sequence[str]
  ) -> dict[str, np.ndarray]:
    """See `table.Table.read`."""
    rows: dict[str, np.ndarray] = {}
    others = [name for name in columns if name != self._image]
    if self._known is not None and others:
      rows = self._known.read(indices, others)
    if self._image in columns:
      contents = [pathlib.Path(self.files[i]).read_bytes() for i in indices]
      rows[self._image] = table_lib.objects(contents)
    return rows

  def reopened(self) -> "ImageTable":
    """Returns this table: files are opened each time."""
    return self


def from_images(
  path: sources.Path,
  *,
  test: sources.Path | None = None,
  image: str = "image",
  **options: Unpack[options_lib.Options],
) -> dataset.Dataset:
  """Returns a data set of images in files, each decoded when it is read.

  Args:
    path: a folder with a folder of images for each class, whose name is the
      column "label"; or a folder of images, with no label; or a manifest: a CSV
      file with a column of the images' paths, relative to its own folder, and
      any others, as `from_csv` reads them. `targets="label"` and
      `classes=[...]` name the labels; which folders there are is not taken for
      a public list. Images of a folder are in the order of a hash of their
      contents, so their names decide nothing.
    test: the same of the held-out images; None: see `test_fraction`.
    image: the column of the images, or in a manifest of their paths.
    **options: see `dpdist.data.Options`; `inputs` is the images if nothing is
      given. Images are float32 (height, width, channels) in [0, 1].

  Raises:
    ModuleNotFoundError: pillow is not installed.
    ValueError: an option is wrong or does not fit the data, or a file is
      missing.
  """
  options.setdefault("inputs", image)
  options_lib.check(options, test)
  try:
    import PIL  # noqa: F401
  except ModuleNotFoundError as error:
    raise errors.missing("Images", "pillow", "images") from error

  def table(place: sources.Path) -> ImageTable:
    if os.path.isdir(place):
      return _read_folder(pathlib.Path(place), image)
    return _read_manifest(place, image, options)

  held_out = None if test is None else table(test)
  return split.build(table(path), held_out, options)


def _read_folder(folder: pathlib.Path, image: str) -> ImageTable:
  files = [
    path
    for path in sorted(folder.rglob("*"))
    if path.suffix.lower() in _SUFFIXES and path.is_file()
  ]
  if not files:
    raise errors.ArgumentError(
      f"path must be a folder with images in it, or a manifest, got {folder}"
    )
  labels = [path.relative_to(folder).parts[0] for path in files]
  is_flat = [path.parent == folder for path in files]
  if any(is_flat) and not all(is_flat):
    raise errors.ArgumentError(
      f"path must be a folder of images, or of a folder for each class, got"
      f" {folder}, which has images in both places"
    )
  order = sorted(
    range(len(files)), key=lambda i: (_sha256(files[i]), labels[i])
  )
  known = {"label": table_lib.objects([labels[i] for i in order])}
  return ImageTable(
    [str(files[i]) for i in order],
    None if all(is_flat) else memory.MemoryTable(known, "path"),
    image,
  )


def _read_manifest(
  place: sources.Path, image: str, options: options_lib.Options
) -> ImageTable:
  cells: dict[str, Any] = dict(memory.read_cells(place))
  names = cells.pop(image, None)
  if names is None:
    raise errors.ArgumentError(
      f"image must name the column of the images' paths, one of {sorted(cells)}"
      f" of {place}, got {image!r}"
    )
  folder = pathlib.Path(place).parent
  files = [str(folder / name) for name in names]
  missing = sum(not os.path.isfile(file) for file in files)
  if missing:
    raise errors.ArgumentError(
      f"{place} must name files that are there, got {missing} that are not"
    )
  # The images' column is one of texts, and not kept.
  known = memory.parse({**cells, image: names}, options, [image])
  known.pop(image, None)
  return ImageTable(
    files, memory.MemoryTable(known, "path") if known else None, image
  )


def _sha256(path: pathlib.Path) -> bytes:
  return hashlib.sha256(path.read_bytes()).digest()

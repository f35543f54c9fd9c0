"""Writes the data of the projects, tiny and made up, as their users have it."""

from collections.abc import Sequence
import csv
import pathlib

import numpy as np
from PIL import Image
import pyarrow as pa
from pyarrow import parquet

Row = Sequence[object]


def write(project: str, folder: pathlib.Path) -> None:
  """Writes the data of a project beside it, the same each time."""
  _WRITERS[project](folder, np.random.default_rng(0))


def _write_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
  with path.open("w", newline="") as file:
    csv.writer(file).writerows(rows)


def _houses(folder: pathlib.Path, rng: np.random.Generator) -> None:
  rows: list[Row] = [["size", "age", "town", "price"]]
  for _ in range(512):
    size, age = rng.normal(100, 30), rng.uniform(0, 80)
    town = rng.integers(3)
    price = (size - 100) / 30 - (age - 40) / 40 + [0.0, 0.5, -0.5][town]
    name = ("north", "south", "west")[town]
    rows.append([f"{size:.3f}", f"{age:.3f}", name, f"{price:.4f}"])
  _write_rows(folder / "houses.csv", rows)


def _images(folder: pathlib.Path, rng: np.random.Generator) -> None:
  folder = folder / "images"
  for part, size in (("train", 240), ("test", 60)):
    rows: list[Row] = [["image", "top", "left", "bright"]]
    (folder / part).mkdir(parents=True)
    for i in range(size):
      top, left, bright = rng.integers(0, 2, 3)
      pixels = rng.integers(0, 60, (8, 8)) + 90 * bright
      pixels[:4] += 60 * top
      pixels[:, :4] += 45 * left
      name = f"{part}/{i}.png"
      Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
      rows.append([name, top, left, bright])
    _write_rows(folder / f"{part}.csv", rows)


def _messages(folder: pathlib.Path, rng: np.random.Generator) -> None:
  """A word after "in" is a town, and after "with" a person."""
  words = ["in", "with", *(f"w{i}" for i in range(20))]
  (folder / "words.txt").write_text("\n".join(words))
  for part, people in (("train", 128), ("test", 32)):
    rows: list[Row] = [["person", "words", "tags"]]
    for person in range(people):
      for _ in range(rng.integers(1, 5)):
        chosen = [words[i] for i in rng.integers(0, len(words), 8)]
        chosen[2:6:3] = rng.choice(words[:2], 2)
        before = ["", *chosen[:-1]]
        named = {"in": "town", "with": "person"}
        tags = [named.get(word, "other") for word in before]
        text = " ".join(chosen), " ".join(tags)
        rows.append([f"{part}{person}", *text])
    _write_rows(folder / f"{part}.csv", rows)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  layers = {"hidden": (32, 32), "tags": (32, 3)}
  base = {"embed/embedding": 0.7 * draw(len(words) + 1, 16)}
  for name, shape in layers.items():
    base[f"{name}/base/kernel"] = draw(*shape) / shape[0] ** 0.5
    base[f"{name}/base/bias"] = np.zeros(shape[1:], np.float32)
  np.savez(folder / "base.npz", **base)


def _purchases(folder: pathlib.Path, rng: np.random.Generator) -> None:
  """Whoever saw an item of one of 16 shelves buys one of the same shelf."""
  for part, people in (("train", 512), ("test", 64)):
    seen, bought = [], []
    for _ in range(people):
      size = int(rng.integers(2, 7))
      shelves = rng.permutation(16)[:size]
      seen.append([int(16 * rng.integers(8) + x) for x in shelves])
      bought.append([int(19_000 + 16 * rng.integers(8) + x) for x in shelves])
    lists = pa.list_(pa.int32())
    table = {"seen": pa.array(seen, lists), "bought": pa.array(bought, lists)}
    parquet.write_table(pa.table(table), folder / f"{part}.parquet")


def _patients(folder: pathlib.Path, rng: np.random.Generator) -> None:
  rows: list[Row] = [["age", "dose", "years", "died"]]
  for _ in range(512):
    age, dose = rng.normal(60, 10), rng.uniform(0, 10)
    scale = np.exp(1 - (age - 60) / 10 + (dose - 5) / 6)
    years, seen_for = scale * rng.weibull(1.5), rng.uniform(1, 10)
    observed = max(min(years, seen_for), 0.01)
    died = int(years <= seen_for)
    rows.append([f"{age:.2f}", f"{dose:.2f}", f"{observed:.3f}", died])
  _write_rows(folder / "patients.csv", rows)


_WRITERS = {
  "house_prices": _houses,
  "image_tags": _images,
  "tagger": _messages,
  "recommender": _purchases,
  "survival": _patients,
}
NAMES = tuple(_WRITERS)

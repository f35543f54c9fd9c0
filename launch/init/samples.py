"""Made-up data for new projects: always the same, and nobody's."""

import csv
import pathlib
import random

from PIL import Image
from PIL import ImageDraw

_JOBS = {"cook": -1.0, "nurse": 0.0, "pilot": 1.5, "teacher": -0.5}


def write_tabular(folder: pathlib.Path) -> None:
  """Writes people.csv: rows of people, and whether they earn more than most."""
  rng = random.Random(0)
  with open(folder / "people.csv", "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["age", "hours", "job", "earns"])
    for _ in range(1200):
      age, hours = rng.randint(20, 70), rng.randint(20, 60)
      job = rng.choice(list(_JOBS))
      score = (age - 45) / 15 + (hours - 38) / 10 + _JOBS[job]
      earns = "more" if score + rng.gauss(0, 0.5) > 0 else "less"
      writer.writerow([age, hours, job, earns])


def write_image(folder: pathlib.Path) -> None:
  """Writes images/train and images/test: crosses, discs and squares."""
  rng = random.Random(0)
  for part, count in (("train", 240), ("test", 60)):
    for shape in ("cross", "disc", "square"):
      place = folder / "images" / part / shape
      place.mkdir(parents=True)
      for number in range(count):
        _draw(shape, rng).save(place / f"{number:03}.png")


def _draw(shape: str, rng: random.Random) -> Image.Image:
  """Returns a picture of 16 by 16 pixels with some noise."""
  image = Image.new("L", (16, 16))
  pixels = [rng.randint(0, 60) for _ in range(16 * 16)]
  image.putdata(pixels)
  draw = ImageDraw.Draw(image)
  x, y, size = rng.randint(1, 5), rng.randint(1, 5), rng.randint(8, 9)
  box = (x, y, x + size, y + size)
  light = rng.randint(150, 255)
  if shape == "disc":
    draw.ellipse(box, fill=light)
  elif shape == "square":
    draw.rectangle(box, outline=light, width=2)
  else:
    draw.line(box, fill=light, width=2)
    draw.line((x, y + size, x + size, y), fill=light, width=2)
  return image


def write_text(folder: pathlib.Path) -> None:
  """Writes lines.txt: short sentences."""
  rng = random.Random(0)
  who = ("my sister", "the baker", "a neighbour", "the old man", "nobody")
  does = ("buys", "draws", "forgets", "paints", "sells")
  what = ("a boat", "two apples", "the red house", "a song", "the map")
  lines = [
    f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)} on day"
    f" {rng.randint(1, 999)}\n"
    for _ in range(2000)
  ]
  (folder / "lines.txt").write_text("".join(lines))

"""Writes a project of your own, which trains as it is.

It has a config file with settings, data and task, made-up data, a test, and a
README that says what to change.
"""

import argparse
import pathlib

from ..cli import exit_codes
from ..cli import words
from . import samples

_KINDS = {
  "tabular": ("rows of a CSV file", samples.write_tabular, "people.csv"),
  "image": ("images in a folder", samples.write_image, "images/"),
  "text": ("lines of a text file", samples.write_text, "lines.txt"),
}

_README = """\
# {name}

A model of {what}, trained with differential privacy by dpdist.

| command | what it does |
| --- | --- |
| `{train}` | trains, or goes on after a stop |
| `{budget}` | says what a run would spend |
| `{check}` | holds the clipping against `jax.grad` |
| `{evaluate}` | gives the metrics of the newest checkpoint |
| `pytest {folder}` | checks that settings, data and task fit |

`{data}` holds made-up data. Put your own in its place, and change in
`config.py`:

1. `get_dataset`: the names, classes and means of your data. They are public,
   and come from elsewhere.
2. `config.privacy.num_examples`: how many examples are trained on, which is
   public too. A wrong number is refused, with the right one.
3. `config.privacy.target_epsilon` and `target_delta`: what the run may reveal.
   Delta is well below 1 / num_examples.
4. `get_task`: the model, its loss and its held-out metrics.

The run's directory has `result.json` and `report.html`, which may be released,
and `secret`, which may not.
"""

_TEST = '''\
"""Settings, data and task fit together."""

import jax
import numpy as np

import config as project
import dpdist


def test_num_examples_is_right():
  config = project.get_config()
  dataset = project.get_dataset(config)
  assert len(dataset.train) == config.privacy.num_examples


def test_the_plan_keeps_to_its_target():
  config = project.get_config()
  plan = dpdist.make_plan(dpdist.config.privacy_config(config))
  assert plan.epsilon() <= config.privacy.target_epsilon


def test_the_loss_of_an_example_is_finite():
  config = project.get_config()
  task = project.get_task(config)
  rows = project.get_dataset(config).test.read(np.arange(1))
  example = {{name: array[0] for name, array in rows.items()}}
  params = task.init(jax.random.key(0), example)
  loss, _ = task.loss(params, example, jax.random.key(1))
  assert np.isfinite(loss)
'''


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  made = argparse.ArgumentParser(
    prog=words.line("init"), description=__doc__, allow_abbrev=False
  )
  made.add_argument("folder", help="The project's folder, which is made.")
  made.add_argument(
    "--kind", choices=_KINDS, default="tabular", help="What the data is."
  )
  return made


def main() -> int:
  """Returns an exit code."""
  arguments = parser().parse_args()
  folder = pathlib.Path(arguments.folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    parser().error(
      f"folder must be new or empty, got {arguments.folder!r}: nothing is"
      " overwritten"
    )
  _write(folder, arguments.kind)
  config = f"--config={folder.as_posix()}/config.py"
  names = sorted(path.name for path in folder.iterdir())
  print(f"wrote {folder}: {', '.join(names)}")
  print(f"try: {words.line('train', config, '--workdir=/tmp/run')}")
  return exit_codes.DONE


def _write(folder: pathlib.Path, kind: str) -> None:
  what, write_sample, data = _KINDS[kind]
  folder.mkdir(parents=True, exist_ok=True)
  template = pathlib.Path(__file__).with_name(f"{kind}.py")
  (folder / "config.py").write_text(template.read_text("utf-8"))
  (folder / "config_test.py").write_text(_TEST.format())
  config = f"--config={folder.as_posix()}/config.py"
  workdir = "--workdir=/tmp/run"
  text = _README.format(
    name=folder.resolve().name,
    folder=folder.as_posix(),
    what=what,
    data=data,
    train=words.line("train", config, workdir),
    budget=words.line("budget", config),
    check=words.line("check", config),
    evaluate=words.line("eval", config, workdir),
  )
  (folder / "README.md").write_text(text)
  write_sample(folder)

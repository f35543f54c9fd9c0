"""Kills real runs at random moments, and checks what is left each time.

  python -m tests.benchmarks.kills --kills=200

Runs are forked from a process that has imported the libraries; with
--method=spawn each begins from nothing, as `python -m launch.train` does. Ends
with an assertion if a run was found to have released a step that is not
recorded, or to end with another epsilon or other parameters than one that
nothing interrupted.
"""

import argparse
import pathlib
import tempfile
import time

from tests.support import training


def main() -> None:
  """Prints a line every ten kills, and a summary."""
  parser = argparse.ArgumentParser(description="Kills at random moments.")
  parser.add_argument("--kills", type=int, default=200)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--method", choices=["forkserver", "spawn"], default="forkserver"
  )
  arguments = parser.parse_args()
  began = time.monotonic()
  signs: dict[str, int] = {}
  runs = set()
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    whole = training.Run(directory / "whole", method=arguments.method)
    assert whole.wait() == 0, whole.screen
    expected = training.outcome(whole.workdir)
    for number, kill in enumerate(
      training.kill_often(
        directory,
        expected,
        kills=arguments.kills,
        seed=arguments.seed,
        method=arguments.method,
      ),
      start=1,
    ):
      signs[kill.sign] = signs.get(kill.sign, 0) + 1
      runs.add(kill.workdir)
      if number % 10 == 0:
        print(
          f"{number:5} kills, {time.monotonic() - began:6.0f} s: run"
          f" {len(runs)} has released {kill.released} of"
          f" {training.NUM_STEPS} steps",
          flush=True,
        )
  print(f"{sum(signs.values())} kills of {len(runs)} runs; all ended the same:")
  print(f"  {expected}")
  for sign, count in sorted(signs.items()):
    print(f"  {count:4} after changes of {sign}")


if __name__ == "__main__":
  main()

r"""Gives the package thousands of files and settings that are not as meant.

  python -m tests.privacy.fuzz --inputs=1000 --seed=1 [--kinds=idx,head]

What must come of each is a right answer, or one error that the package itself
raises, clear and of one line; and what was on disk must be there, byte for
byte. Each kind of input has a process of its own, so that one that takes the
interpreter down is found as well. An input is a function of kind, seed and
number.
"""

import argparse
import multiprocessing
import pathlib
import sys
import tempfile
import time
from typing import Any

from tests.privacy import fuzz_kinds
from tests.privacy import outcomes


def make(name: str, folder: pathlib.Path) -> outcomes.Kind:
  """A kind of inputs, by name, that keeps its files in a folder."""
  folder.mkdir(parents=True, exist_ok=True)
  return fuzz_kinds.KINDS[name](folder)


def _child(
  name: str, inputs: range, seed: int, number: Any, answer: Any
) -> None:
  with tempfile.TemporaryDirectory() as folder:
    kind = make(name, pathlib.Path(folder))

    def tell(now: int) -> None:
      number.value = now

    answer.put(outcomes.run(kind, name, inputs=inputs, seed=seed, tell=tell))


def main() -> int:
  """Returns an exit code."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--inputs", type=int, default=1000)
  parser.add_argument("--first", type=int, default=0)
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--kinds", default=",".join(fuzz_kinds.KINDS))
  parser.add_argument("--show", type=int, default=5, help="faults of a kind")
  given = parser.parse_args()
  context = multiprocessing.get_context("spawn")
  num_inputs = num_faults = 0
  for name in given.kinds.split(","):
    first, stop = given.first, given.first + given.inputs
    started, counts, faults = time.monotonic(), {}, []
    while first < stop:
      number, answer = context.Value("q", first), context.Queue()
      process = context.Process(
        target=_child,
        args=(name, range(first, stop), given.seed, number, answer),
      )
      process.start()
      got = None
      while got is None and process.is_alive():
        try:
          got = answer.get(timeout=0.5)
        except Exception:
          continue
      process.join()
      if got is None and process.exitcode:
        faults.append(
          f"{name}, seed {given.seed}, input {number.value}: the interpreter"
          f" ended with {process.exitcode}"
        )
        first = number.value + 1
        continue
      for outcome, count in (got or answer.get())[0].items():
        counts[outcome] = counts.get(outcome, 0) + count
      faults += (got or ({}, []))[1]
      first = stop
    num_inputs, num_faults = num_inputs + given.inputs, num_faults + len(faults)
    print(
      f"{name:<14} {given.inputs:>7} inputs, seed {given.seed}:"
      f" {', '.join(f'{n} {x}' for x, n in sorted(counts.items()))};"
      f" {len(faults)} faults, {time.monotonic() - started:.0f} s",
      flush=True,
    )
    for fault in faults[: given.show]:
      print(f"  {fault}", flush=True)
  print(f"{num_inputs} inputs, {num_faults} faults")
  return 1 if num_faults else 0


if __name__ == "__main__":
  sys.exit(main())

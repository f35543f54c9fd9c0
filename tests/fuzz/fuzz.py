r"""Gives the package thousands of files and settings that are not as meant.

  python -m tests.fuzz.fuzz --inputs=1000 --seed=1 [--kinds=idx,head]

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

from tests.fuzz import fuzz_kinds
from tests.fuzz import outcomes


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

    answer.send(outcomes.run(kind, name, inputs=inputs, seed=seed, tell=tell))
    answer.close()


def _tried(
  name: str, inputs: range, seed: int
) -> tuple[dict[str, int], list[str]]:
  """As `outcomes.run`, in processes of their own: some may not survive."""
  context = multiprocessing.get_context("spawn")
  counts: dict[str, int] = {}
  faults: list[str] = []
  first = inputs.start
  while first < inputs.stop:
    number = context.Value("q", first)
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(
      target=_child,
      args=(name, range(first, inputs.stop), seed, number, sender),
    )
    process.start()
    sender.close()
    try:
      found, bad = answer.recv()
      first = inputs.stop
    except EOFError:
      process.join()
      found, bad = {"fault": 1}, []
      faults.append(
        f"{name}, seed {seed}, input {number.value}: the interpreter ended with"
        f" {process.exitcode}"
      )
      first = number.value + 1
    process.join()
    faults += bad
    for outcome, count in found.items():
      counts[outcome] = counts.get(outcome, 0) + count
  return counts, faults


def main() -> int:
  """Returns an exit code."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--inputs", type=int, default=1000)
  parser.add_argument("--first", type=int, default=0)
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--kinds", default=",".join(fuzz_kinds.KINDS))
  parser.add_argument("--show", type=int, default=5, help="faults of a kind")
  given = parser.parse_args()
  inputs = range(given.first, given.first + given.inputs)
  num_inputs = num_faults = 0
  for name in given.kinds.split(","):
    started = time.monotonic()
    counts, faults = _tried(name, inputs, given.seed)
    num_inputs, num_faults = num_inputs + len(inputs), num_faults + len(faults)
    print(
      f"{name:<16} {len(inputs):>7} inputs, seed {given.seed}:"
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

"""Measures how soon each command answers, and a run says its first words.

  python -m tests.benchmarks.startup [--rounds=5]

Each time is a median of processes of their own, and given as a ratio to that of
`python -c "import absl.app"` too, which a slow machine slows as much.
"""

import argparse
from collections.abc import Callable
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

_ROOT = pathlib.Path(__file__).parents[2]
_DIGITS = "--config=configs/digits.py"


def _answered(*words: str) -> float:
  """Seconds until a process has ended."""
  start = time.monotonic()
  subprocess.run(
    [sys.executable, *words], cwd=_ROOT, capture_output=True, check=False
  )
  return time.monotonic() - start


def _first_words() -> float:
  """Seconds until a run says something."""
  with tempfile.TemporaryDirectory() as workdir:
    start = time.monotonic()
    process = subprocess.Popen(
      [sys.executable, "-m", "launch.train", _DIGITS, f"--workdir={workdir}"],
      cwd=_ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.readline()
    seconds = time.monotonic() - start
    process.kill()
    process.communicate()
  return seconds


def _main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=5)
  rounds = parser.parse_args().rounds
  median = lambda fn: statistics.median(fn() for _ in range(rounds))
  whole = median(lambda: _answered("-c", "import absl.app"))
  names = sorted(path.stem for path in (_ROOT / "launch").glob("[a-z]*.py"))
  cases: dict[str, Callable[[], float]] = {
    f"{name} --help": lambda name=name: _answered(
      "-m", f"launch.{name}", "--help"
    )
    for name in names
  }
  cases |= {
    "train, an unknown setting": lambda: _answered(
      *("-m", "launch.train", _DIGITS, "--workdir=w", "--config.privcy=1")
    ),
    "train, first words": _first_words,
  }
  print(f"import absl.app  {whole:.2f} s")
  for name, case in cases.items():
    seconds = median(case)
    print(f"{name:<26} {seconds:.2f} s  {seconds / whole:.1f} times")


if __name__ == "__main__":
  _main()

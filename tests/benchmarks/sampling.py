"""Measures what a Poisson draw costs.

  python -m tests.benchmarks.sampling [--json]

The cost must follow the number of examples drawn, not the number there are.
"""

import argparse
import json
import statistics
import time

from dpdist import sampling

# (num_examples, sampling_probability, the most milliseconds a draw may take)
_CASES = [
  (60_000, 256 / 60_000, 2.0),
  (1_000_000, 1e-3, 2.0),
  (1_000_000_000, 1e-6, 2.0),
  (1_000_000_000_000, 1e-9, 2.0),
  (10_000_000, 0.1, 90.0),
  (2_000_000, 0.5, 60.0),
  (1_000_000_000, 1e-3, 60.0),
]
_NUM_DRAWS = 15


def measure(
  num_examples: int, sampling_probability: float, target_ms: float
) -> dict[str, float]:
  """Returns one row of the table: times are of one draw, in milliseconds."""
  sampler = sampling.PoissonSampler(
    num_examples=num_examples,
    sampling_probability=sampling_probability,
    seed=b"benchmark",
  )
  times = []
  sampler(0)
  for step in range(1, _NUM_DRAWS + 1):
    start = time.perf_counter()
    sampler(step)
    times.append(1e3 * (time.perf_counter() - start))
  return {
    "num_examples": num_examples,
    "sampling_probability": sampling_probability,
    "expected_batch_size": num_examples * sampling_probability,
    "median_ms": statistics.median(times),
    "min_ms": min(times),
    "max_ms": max(times),
    "target_ms": target_ms,
  }


def main() -> None:
  """Prints a table, or JSON."""
  parser = argparse.ArgumentParser(description="Cost of a Poisson draw.")
  parser.add_argument("--json", action="store_true", help="print JSON")
  arguments = parser.parse_args()
  rows = [measure(*case) for case in _CASES]
  if arguments.json:
    print(json.dumps({"benchmark": "sampling", "rows": rows}, indent=2))
    return
  print(
    f"{'examples':>17} {'q':>9} {'batch':>9} {'median ms':>9} {'target':>7}"
  )
  for row in rows:
    print(
      f"{row['num_examples']:17,d} {row['sampling_probability']:9.2e} "
      f"{row['expected_batch_size']:9,.0f} {row['median_ms']:9.2f} "
      f"{row['target_ms']:7.1f}"
    )


if __name__ == "__main__":
  main()

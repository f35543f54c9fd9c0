r"""Measures a config's private step here, or forecasts it on a pod of TPUs.

  python -m launch.bench --config=configs/digits.py
  python -m launch.bench --config=configs/digits.py --autotune

measure the private step against the same step without privacy, on this machine
and the config's mesh: time, memory, examples a second, how each layer is
clipped, and whether the chunk size is good; --autotune finds the largest chunk
that fits by trying. With --topology, the step is compiled for a pod, and
nothing is run:

  python -m launch.bench --config=configs/decoder_1b.py \
    --topology=v6e:16x16 --num_slices=8

needs no device and, for models of tokens, no data; it needs libtpu (pip install
-e '.[tpu]'). A topology is a kind of chip (v4, v5e, v5p, v6e) and the shape of
a slice. None of these spends budget; any setting of the config can be changed,
as --config.mesh.fsdp=32.

Exit codes: 0 it fits; 1 it does not; 2 wrong usage.
"""

from typing import Any

from absl import flags

from dpdist.files import json_fields
from dpdist.privacy import statement
from dpdist.profiling import autotune
from dpdist.profiling import forecast
from dpdist.profiling import measure
from dpdist.reporting import console

from .cli import common_flags
from .cli import config_parts
from .cli import exit_codes
from .cli import flag_parsing

_CONFIG = common_flags.config()
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "A kind of chip and the shape of a slice, as v6e:16x16."
)
_AUTOTUNE = flags.DEFINE_bool(
  "autotune", False, "Find the largest chunk that fits this machine."
)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each step.")
_SLICES = flags.DEFINE_integer("num_slices", 1, "The number of slices.")
_JSON = common_flags.json()

_GB = 1e9


def main() -> int:
  """Returns an exit code."""
  try:
    if _TOPOLOGY.value is None:
      facts = _here()
    elif _AUTOTUNE.value:
      raise ValueError("--autotune tries on this machine: without --topology")
    else:
      facts = forecast.forecast(
        _CONFIG.value,
        _TOPOLOGY.value,
        _SLICES.value,
        config_parts.load("config"),
      )
  except ValueError as error:
    return flag_parsing.usage_error(error)
  if _JSON.value:
    print(json_fields.text(facts))
  elif "tries" in facts:
    _show_tries(facts)
  elif _TOPOLOGY.value is None:
    _show_here(facts)
  else:
    _show_pod(facts)
  return exit_codes.DONE if facts["fits"] else exit_codes.UNSOUND


def _here() -> dict[str, Any]:
  bench = measure.prepare(_CONFIG.value, config_parts.load("config"))
  if not _AUTOTUNE.value:
    return measure.compare(bench, rounds=_ROUNDS.value)
  facts = autotune.search(bench)
  return facts | {"fits": facts["largest"] is not None}


def _show_here(facts: dict[str, Any]) -> None:
  mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
  console.show_table(
    "Measured here",
    [
      ("device", f"{facts['num_devices']} x {facts['device']}, {mesh}"),
      ("parameters", f"{facts['parameters']:,}"),
      ("expected batch size", f"{facts['expected_batch_size']:,g}"),
      (
        "chunks a step",
        f"{facts['chunks_per_step']} of {facts['chunk_size']:,}",
      ),
      (
        "private over ordinary",
        f"time {facts['time_ratio']:.2f}, memory {facts['memory_ratio']:.2f}"
        f" (medians of {facts['rounds']} rounds)",
      ),
    ],
  )
  for name in ("private", "ordinary"):
    step = facts[name]
    console.show_table(
      f"The {name} step",
      [
        ("step", f"{1e3 * step['step_seconds']:.2f} ms"),
        ("of it, a chunk", f"{1e3 * step['chunk_seconds']:.2f} ms"),
        ("of it, the update", f"{1e3 * step['update_seconds']:.2f} ms"),
        ("examples a second", f"{step['examples_per_second']:,.0f}"),
        ("memory of a device", console.human_bytes(step["bytes"])),
      ],
    )
  print("How each layer is clipped")
  for line in facts["clipping"]:
    print(f"  {line}")
  print("Chunk size")
  for line in facts["advice"]:
    print(f"  {line}")


def _show_tries(facts: dict[str, Any]) -> None:
  rows = [
    (
      f"{row['chunk_size']:,}",
      f"{console.human_bytes(row['bytes'] or 0)},"
      f" {row['examples_per_second']:,.0f} examples/s"
      if row["fits"]
      else f"{console.human_bytes(row['bytes'] or 0)}, does not fit",
    )
    for row in facts["tries"]
  ]
  console.show_table("Chunks that were tried", rows)
  free = console.human_bytes(facts["free_bytes"])
  if facts["largest"] is None:
    print(f"None fits the {free} that are free on a device.")
    return
  print(
    f"Largest that fits {free} of a device: --config.chunk_size="
    f"{facts['largest']}\nFastest of these: --config.chunk_size="
    f"{facts['fastest']}"
  )


def _show_pod(facts: dict[str, Any]) -> None:
  console.show_table("Compiled, not run", _plan_rows(facts))
  console.show_table("Memory of a chip", _memory_rows(facts))
  if "apply" in facts:
    for name in ("accumulate", "apply"):
      console.show_table(_TITLES[name], _program_rows(facts[name]))
    console.show_table("At best", _time_rows(facts))


_TITLES = {
  "accumulate": "accumulate, each chunk, on a chip",
  "apply": "apply, once a step, on a chip",
}


def _plan_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
  mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
  slices = f"{facts['num_slices']} x " if facts["num_slices"] > 1 else ""
  return [
    ("chips", f"{facts['num_chips']:,} ({slices}{facts['topology']})"),
    ("mesh", mesh),
    ("parameters", f"{facts['parameters']:,}"),
    ("expected batch size", f"{facts['expected_batch_size']:,g}"),
    ("chunks a step", f"{facts['chunks_per_step']} of {facts['chunk_size']:,}"),
    (
      "privacy",
      f"epsilon {statement.rounded_up(facts['epsilon'], 4)} at delta"
      f" {facts['delta']:g} after"
      f" {facts['num_steps']:,} steps (noise {facts['noise_multiplier']:.4f})",
    ),
  ]


def _memory_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
  memory = dict(facts["memory"])
  capacity, peak = memory.pop("capacity"), memory.pop("peak", None)
  names = {
    "accumulate_temp": "activations and temporaries (accumulate)",
    "apply_temp": "temporaries (apply)",
  }
  rows = [
    (str(names.get(name, name)), f"{size / _GB:.3f} GB")
    for name, size in memory.items()
  ]
  if peak is None:
    return [*rows, ("fits", f"no: {facts['reason']}")]
  fits = "yes" if facts["fits"] else "no"
  return [
    *rows,
    ("fits", f"{fits}: {peak / _GB:.2f} of {capacity / _GB:.0f} GB at most"),
  ]


def _program_rows(program: dict[str, Any]) -> list[tuple[str, str]]:
  seconds = program["seconds"]
  rows = [
    (
      "matrix products",
      f"{program['flops'] / 1e12:.3f} Tflop, {seconds['arithmetic']:.4f} s",
    ),
    (
      "memory traffic",
      f"{program['bytes'] / _GB:.2f} GB, {seconds['memory']:.4f} s",
    ),
  ]
  merged: dict[tuple[Any, ...], list[float]] = {}
  for x in program["collectives"]:
    place = (x["kind"], x["group_size"], x["num_runs"], x["is_between_slices"])
    merged.setdefault(place, []).append(x["bytes_sent"])
  for (kind, size, runs, between), sent in merged.items():
    among = f"{size} slices" if between else f"{size} chips"
    times = f" x {runs}" if runs > 1 else ""
    rows.append(
      (
        f"{kind} of {among}",
        f"{len(sent)}{times}, {sum(sent) / _GB:.3f} GB sent",
      )
    )
  rows.append(
    ("network", f"{seconds['links']:.4f} s, slices {seconds['network']:.4f} s")
  )
  return rows


def _time_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
  return [
    (
      f"{row['num_chips']:,} chips",
      f"{row['step_seconds']:.2f} s a step, {row['chunks_per_step']} chunks,"
      f" efficiency {row['efficiency']:.2f}",
    )
    for row in facts["scaling"]
  ]


if __name__ == "__main__":
  flag_parsing.run(main)

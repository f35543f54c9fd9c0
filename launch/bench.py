r"""Compiles a config's step for a pod of TPUs, and tells what it would need.

  python -m launch.bench --config=configs/decoder_1b.py \
    --topology=v6e:16x16 --num_slices=8

Needs no device, no data for models of tokens, and spends no budget; wants
libtpu (pip install -e '.[tpu]'). Any setting of the config can be changed, as
--config.mesh.fsdp=32. Topologies are a kind of chip (v4, v5e, v5p, v6e) and the
shape of a slice.

Exit codes: 0 it fits; 1 it does not; 2 wrong usage.
"""

from collections.abc import Sequence
import json
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpdist import forecast
from dpdist import screen
from launch import exit_codes
from launch import flag_parsing

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file in configs/; --config.a.b=value changes a setting."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "A kind of chip and the shape of a slice, as v6e:16x16."
)
_SLICES = flags.DEFINE_integer("num_slices", 1, "So many slices.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
flags.mark_flags_as_required(["config", "topology"])

_GB = 1e9


def main(argv: Sequence[str]) -> int:
  """Returns an exit code."""
  del argv
  try:
    facts = forecast.forecast(
      _CONFIG.value, str(_TOPOLOGY.value), _SLICES.value
    )
  except ValueError as error:
    return flag_parsing.usage_error(error)
  if _JSON.value:
    print(json.dumps(facts, indent=2))
  else:
    screen.show_table("Compiled, not run", _plan_rows(facts))
    screen.show_table("Memory of a chip", _memory_rows(facts))
    if "apply" in facts:
      for name in ("accumulate", "apply"):
        screen.show_table(_TITLES[name], _program_rows(facts[name]))
      screen.show_table("At best", _time_rows(facts))
  return exit_codes.DONE if facts["fits"] else exit_codes.UNSOUND


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
      f"epsilon {facts['epsilon']:.4f} at delta {facts['delta']:g} after"
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

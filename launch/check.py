r"""Says what a run would find before its first charge.

  dpdist check --config=digits
  dpdist check --config=digits --workdir=/data/digits

Data, held-out labels, model and plan; whether the noise leaves anything to
learn from; memory of a device, time to expect, and disk. And does the config's
own step clip correctly? It is compiled for this machine's devices and the
config's mesh, and compared with `jax.grad` on made-up examples of every size,
as `launch.train` does. No budget is spent, and nothing is written.

With --workdir it looks at the run that is there as well: would the same command
of `launch.train` go on with it, open a branch or a segment, or be refused, and
what would be charged? With a shared budget in the config (data_budget) it says
whether the run would be admitted, and how much would be left.

Exit codes: 0 it can run; 1 it does not clip as it must, or fails; 2 wrong
usage, or the run would be refused.
"""

from typing import Any

from absl import flags

from dpdist import errors
from dpdist.files import json_fields

from .cli import common_flags
from .cli import config_parts
from .cli import exit_codes
from .cli import flag_parsing
from .cli import messages

_CONFIG = common_flags.config()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The directory of the run, if it is there or is to be there."
)
_JSON = common_flags.json()

_MOST_WAYS = 12


def main() -> int:
  """Returns an exit code."""
  # Imported here: flags are parsed before jax is imported.
  from dpdist.distributed import progress
  from dpdist.profiling import rehearsal
  from dpdist.reporting import console
  from dpdist.workdir import fingerprint

  if _CONFIG.value.clipping.exact_sum:
    fingerprint.pin_threads()  # As a run does, before a device is touched.
  try:
    with console.Phases() as phases:
      facts = rehearsal.rehearse(
        _CONFIG.value,
        config_parts.load("config"),
        workdir=_WORKDIR.value,
        progress=progress.Progress(None if _JSON.value else phases.enter),
        tell=console.warn,
      )
  except ValueError as error:
    return flag_parsing.usage_error(error)
  except errors.SensitivityError as error:
    return messages.show(messages.Message(str(error)))
  if _JSON.value:
    print(json_fields.text(facts))
  else:
    console.show_table("Checked, nothing charged", _rows(facts))
  return exit_codes.DONE


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
  from dpdist.privacy import statement
  from dpdist.reporting import console

  data, labels, plan = facts["data"], facts["labels"], facts["plan"]
  model, signal, memory = facts["model"], facts["signal"], facts["memory"]
  time, disk = facts["time"], facts["disk"]
  arrays = ", ".join(
    f"{name} {x['dtype']}{x['shape']}" for name, x in data["arrays"].items()
  )
  mesh = " x ".join(f"{axis} {size}" for axis, size in model["mesh"].items())
  frozen = f", {model['frozen']:,} frozen" if model["frozen"] else ""
  rows = [
    (
      "data",
      f"{data['num_train']:,} {data['unit']}s to train on,"
      f" {data['num_test']:,} examples held out",
    ),
    ("of it, a row", arrays),
  ]
  if labels is not None:
    rows.append(
      (
        "held-out labels",
        f"{labels['num_classes']:,} classes, {labels['smallest']} to"
        f" {labels['largest']}; always the most frequent one scores"
        f" {labels['share_of_the_most_frequent']:.3f}",
      )
    )
  rows += [
    (
      "model",
      f"{model['parameters']:,} parameters in {model['arrays']:,} arrays"
      f"{frozen}, {', '.join(model['dtypes'])}",
    ),
    ("mesh", f"{mesh} ({model['device']}), chunks of {model['chunk_size']:,}"),
    (
      "plan",
      f"epsilon {statement.rounded_up(plan['epsilon'], 4)} at delta"
      f" {plan['delta']:g}, {plan['delta_times_examples']:.2g} of 1 /"
      f" {data['num_train']:,} ({plan['accountant']} accountant)",
    ),
    (
      "noise and batch",
      f"noise multiplier {plan['noise_multiplier']:g}, expected batch"
      f" {plan['expected_batch_size']:,g}, q"
      f" {plan['sampling_probability']:.4g} ({plan['sampling']})",
    ),
    ("steps", f"{plan['num_steps']:,}, {plan['epochs']:.4g} epochs"),
    *_run(facts["run"]),
    *_budget(facts["budget"]),
    (
      "signal over noise",
      f"{signal['step']:.2g} at most in a step, {signal['all_steps']:.2g} in"
      f" all: {signal['advice']}",
    ),
    *_clipping(facts["sensitivity"]),
    (
      "memory of a device",
      f"{console.human_bytes(memory['most'])} (arguments and temporaries of"
      f" the compiled step), {console.human_bytes(memory['free'])} free",
    ),
    (
      "time",
      f"{1e3 * time['step']:.3g} ms a step, {_duration(time['all_steps'])} in"
      f" all; {time['measured']}",
    ),
    (
      "disk",
      f"{disk['kept']} checkpoints of"
      f" {console.human_bytes(disk['checkpoint'])}, and one while it is"
      f" written; {console.human_bytes(disk['free'])} free",
    ),
  ]
  return rows + [("WARNING", warning) for warning in facts["warnings"]]


def _run(run: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns rows on the run that is in the directory, if there is one."""
  from dpdist.privacy import statement
  from dpdist.workdir import outlook

  if run["action"] == outlook.BEGINS:
    return []
  start, last, free = run["start_step"], run["last_step"], run["steps_free"]
  spent, to_charge = run["steps_spent"], run["steps_to_charge"]
  again = f"{free:,} that are charged run again for free, and " if free else ""
  ways = {
    outlook.ENDED: f"it has made all its {last:,} steps: nothing is to be done",
    outlook.GOES_ON: f"goes on after step {start:,}: {again}{to_charge:,} are"
    f" charged, to step {last:,}",
    outlook.BRANCHES: f"opens a branch after step {start:,}, with new keys,"
    " since what decides the bits of a step is not as it was (code, devices,"
    f" settings): {to_charge:,} steps are charged, to step {last:,}",
    outlook.CHANGES: f"opens a segment after step {start:,}, under other"
    f" settings ({'; '.join(run['changes'])}): {to_charge:,} steps are charged,"
    f" to step {last:,}",
  }
  return [
    ("the run there", ways[run["action"]]),
    (
      "its budget",
      f"{spent:,} steps spent so far; epsilon"
      f" {statement.rounded_up(run['epsilon'], 4)} at its end, for all of it",
    ),
    *(("WARNING", text) for text in run["rejected"]),
  ]


def _budget(budget: dict[str, Any] | None) -> list[tuple[str, str]]:
  """Returns a row on the budget that the data's runs share, if they do."""
  if budget is None:
    return []
  reserved, taken = budget["share_reserved"], budget["share_of_this_run"]
  room = f"{1 - reserved - taken:.1%} would be left"
  if budget["reservation"]:
    room = f"from the reservation {budget['reservation']!r}"
  return [
    (
      "shared budget",
      f"epsilon {budget['epsilon']:g} at delta {budget['delta']:g} in"
      f" {budget['location']}: {reserved:.1%} is reserved, this run would take"
      f" {round(taken, 4) + 0.0:.1%} more, {room}",
    )
  ]


def _clipping(report: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns rows on how each parameter is clipped, not too many."""
  ways = [*report["ways"].items()]
  rows = [
    ("sensitivity", f"{report['num_examples']} made-up examples, none too long")
  ]
  rows += [
    (f"  {name or 'parameters'}", way) for name, way in ways[:_MOST_WAYS]
  ]
  if len(ways) > _MOST_WAYS:
    rows.append(("", f"and {len(ways) - _MOST_WAYS} more: --json"))
  return rows


def _duration(seconds: float) -> str:
  for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
    if seconds >= 2 * size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.1f} s"


if __name__ == "__main__":
  flag_parsing.run(main)

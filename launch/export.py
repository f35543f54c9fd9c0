r"""Writes the parameters of a run as safetensors, with a model card.

  dpdist export --workdir=/tmp/digits --output=/tmp/digits_model

The card, README.md, states the parameters' privacy (or that there is no
guarantee), how they were made and how good they are. Spends nothing: reads the
ledger, which must be sound, and computes nothing from an example that was
trained on.

Of a loop of one's own (dpdist.Session) it writes the arrays of the state that
the loop saved, by their paths; --part=0 those under a path, such as the
parameters of a pair of parameters and optimizer state.

Exit codes: 0 done; 1 the record is not sound; 2 wrong usage.
"""

import os
from typing import Any

from absl import flags

from dpdist import errors
from dpdist.files import json_fields

from .cli import common_flags
from .cli import config_parts
from .cli import exit_codes
from .cli import flag_parsing
from .cli import runs

_CONFIG, _STEP = common_flags.checkpoint()
_WORKDIR = common_flags.workdir()
_OUTPUT = flags.DEFINE_string(
  "output", None, "A new or empty directory.", required=True
)
_LEDGER = common_flags.ledger()
_EMA = flags.DEFINE_bool("ema", False, "Write the average of the parameters.")
_NAME = flags.DEFINE_string(
  "name", None, "The model's name on its card; by default the directory's."
)
_PART = flags.DEFINE_string(
  "part", "", "Of a loop of your own: the path of what is written of its state."
)
_JSON = common_flags.json()


def main() -> int:
  """Returns an exit code."""
  # Imported here: flags are parsed before jax is imported.
  from dpdist.export import export
  from dpdist.export import load_run
  from dpdist.export import session_run

  workdir, output = _WORKDIR.value, _OUTPUT.value
  name = _NAME.value or os.path.basename(os.path.abspath(output))
  try:
    if session_run.is_in(workdir):
      runs.refuse_of_a_loop("config", _CONFIG.value)
      runs.refuse_of_a_loop("ema", _EMA.value)
      ledger = runs.open_begun(workdir, _LEDGER.value)
      saved = session_run.load(workdir, ledger, step=_STEP.value)
      facts = session_run.evaluate(saved)
      return _show(
        session_run.write(saved, facts, output, name=name, part=_PART.value)
      )
    if _PART.value:
      raise errors.ArgumentError(
        "part must be left out for a run that is no loop of your own"
        f" (dpdist.Session), got {_PART.value!r}"
      )
    released = load_run.load(
      workdir,
      runs.open_begun(workdir, _LEDGER.value),
      config=_CONFIG.value,
      step=_STEP.value,
      parts=config_parts.load("config"),
    )
    facts = export.write(
      released,
      load_run.evaluate(released),
      output,
      name=name,
      use_ema=_EMA.value,
    )
  except ValueError as error:
    return flag_parsing.usage_error(error)
  return _show(facts)


def _show(facts: dict[str, Any]) -> int:
  from dpdist.reporting import console

  if _JSON.value:
    print(json_fields.text(facts))
  else:
    console.show_table(
      "Exported",
      [
        ("parameters", f"{facts['num_parameters']:,}, step {facts['step']:,}"),
        ("guarantee", facts["guarantee"]),
        ("folder", facts["output"]),
        ("files", "model.safetensors, README.md, config.json"),
      ],
    )
  return exit_codes.DONE


if __name__ == "__main__":
  flag_parsing.run(main)

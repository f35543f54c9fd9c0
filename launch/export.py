r"""Writes the parameters of a run as safetensors, with a model card.

  python -m launch.export --workdir=/tmp/digits --output=/tmp/digits_model

The card, README.md, states the parameters' privacy (or that there is no
guarantee), how they were made and how good they are. Spends nothing: reads the
ledger, which must be sound, and computes nothing from an example that was
trained on.

Exit codes: 0 done; 1 the record is not sound; 2 wrong usage.
"""

import os

from absl import flags

from dpdist.export import export
from dpdist.export import load_run
from dpdist.files import json_fields
from dpdist.reporting import console

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
_JSON = common_flags.json()


def main() -> int:
  """Returns an exit code."""
  workdir, output = _WORKDIR.value, _OUTPUT.value
  name = _NAME.value or os.path.basename(os.path.abspath(output))
  try:
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
  if _JSON.value:
    print(json_fields.text(facts))
  else:
    console.show_table(
      "Exported",
      [
        ("parameters", f"{facts['num_parameters']:,}, step {facts['step']:,}"),
        ("guarantee", facts["guarantee"]),
        ("files", f"{output}: model.safetensors, README.md, config.json"),
      ],
    )
  return exit_codes.DONE


if __name__ == "__main__":
  flag_parsing.run(main)

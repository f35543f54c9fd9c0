r"""Compares a config's own step with `jax.grad`: does it clip correctly?

  python -m launch.check --config=configs/digits.py

Only the shapes of the data are used; weights are read if the config names some.
The step is compiled for this machine's devices and the config's mesh, and run
on made-up examples of every size, as `launch.train` does before it charges
anything. No budget is spent, and nothing is written.

Exit codes: 0 it does; 1 it does not, or the sum fails; 2 wrong usage.
"""

from collections.abc import Callable
import json
from typing import Any

from dpdist import errors
from dpdist.keys import keys
from dpdist.reporting import console
from dpdist.sensitivity import sentinel
from dpdist.training import abstract_step
from dpdist.training import parameters
from dpdist.training import setup
from dpdist.training import step_sentinel

from .cli import common_flags
from .cli import config_parts
from .cli import exit_codes
from .cli import flag_parsing
from .cli import messages

_CONFIG = common_flags.config()
_JSON = common_flags.json()


def main() -> int:
  """Returns an exit code."""
  try:
    check = _prepared(_CONFIG.value)
  except ValueError as error:
    return flag_parsing.usage_error(error)
  try:
    report = check()
  except errors.SensitivityError as error:
    return messages.show(messages.Message(str(error)))
  if _JSON.value:
    print(json.dumps(report._asdict(), indent=2))
  else:
    rows = [("made-up examples", f"{report.num_examples}, none too long")]
    rows += [(name or "parameters", way) for name, way in report.ways.items()]
    console.show_table("Clipping", rows)
  return exit_codes.DONE


def _prepared(config: Any) -> Callable[[], sentinel.Report]:
  """Returns the check to run, once all settings are known to be right."""
  experiment = setup.build(config, parts=config_parts.load("config"))
  step, example = experiment.step, abstract_step.example(experiment)
  start = parameters.of(
    experiment.task, keys.key_data(keys.insecure_secret(0)), example
  )
  row = abstract_step.unit(config, example)
  return lambda: step_sentinel.check_step(
    step,
    start.init(step).params,
    start.frozen(step),
    row=row,
    largest=experiment.largest_integers(row),
    chunk_size=experiment.chunk_size,
    is_watched=config.sentinel.every > 0,
  )


if __name__ == "__main__":
  flag_parsing.run(main)

r"""Reserves a data set's budget for runs to come, for all or for none.

  python -m launch.reserve --config=configs/digits.py --count=20 \
    --label=search --config.data_budget.location=/data/budgets

A search over settings is as many runs as it tries. Each of them then starts
with --config.data_budget.reservation=search and is admitted, whatever was
reserved meanwhile, if it costs no more than this config. launch.budget
--dataset shows the budget, and gives back what was reserved for runs that never
came.

Exit codes: 0 done; 2 wrong usage, or no room; anything else is a failure.
"""

import functools
import sys

from absl import flags

from dpdist import config as config_lib
from dpdist import errors
from dpdist.data import sources
from dpdist.data.datasets import datasets
from dpdist.ledger import budgets
from dpdist.ledger import data_budget
from dpdist.privacy import plan as plan_lib
from dpdist.reporting import console

from .cli import common_flags
from .cli import exit_codes
from .cli import flag_parsing

_CONFIG = common_flags.config("A file in configs/: the dearest of the runs.")
_COUNT = flags.DEFINE_integer(
  "count", None, "The number of runs.", lower_bound=1, required=True
)
_LABEL = flags.DEFINE_string(
  "label", None, "The name of the reservation.", required=True
)


def main() -> int:
  """Returns an exit code."""
  try:
    budget, cost = _reserve()
  except ValueError as error:
    return flag_parsing.usage_error(error)
  except errors.LedgerError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  each, all_runs = budget.share(cost), budget.share(budget.reserved)
  print(
    f"{_LABEL.value}: room for {_COUNT.value} runs of {each:.3%} each of this"
    f" data set's budget, of which {all_runs:.3%} is reserved now"
  )
  return exit_codes.DONE


def _reserve() -> tuple[data_budget.DataBudget, float]:
  """Returns the budget, and the cost of one run."""
  config = _CONFIG.value
  settings = config.data_budget
  if not settings.location:
    raise ValueError("data_budget.location must be given, got ''")
  plan = plan_lib.make_plan(config_lib.privacy_config(config))
  train = datasets.load(config.data).train
  budget = budgets.open_or_make(
    settings.location,
    train.content_digest(),
    epsilon=settings.epsilon,
    delta=settings.delta,
    neighboring_relation=plan.neighboring_relation,
    earlier=functools.partial(sources.earlier_digests, train),
    tell=console.warn,
  )
  cost = budget.cost([plan_lib.PlanUse(plan, plan.num_steps)])
  budget.reserve(_LABEL.value, cost, _COUNT.value)
  return budget, cost


if __name__ == "__main__":
  flag_parsing.run(main)

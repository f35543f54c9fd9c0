"""Writes a model's card: what it is, its privacy, and where it came from.

The card is Markdown with YAML in front, the form that model hubs read.
"""

from collections.abc import Mapping
import json
from typing import Any

import yaml

from dpdist.export import load_run
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import statement
from dpdist.tasks import parts as parts_lib

_TASKS = {1: "text-generation", 3: "image-classification"}


def text(released: load_run.Released, facts: dict[str, Any], name: str) -> str:
  """Returns the card of a model.

  The facts are those of `load_run.evaluate`, with "params_sha256",
  "num_parameters" and "uses_ema".
  """
  front = yaml.safe_dump(_front(released, facts, name), sort_keys=False)
  which = "exponential moving average of the parameters" * facts["uses_ema"]
  which = which or "parameters"
  parts = [
    f"---\n{front}---\n",
    f"# {name}\n",
    f"The {which} after step {facts['step']:,} of a run of dpdist:"
    f" {facts['num_parameters']:,} numbers of"
    f" {_named('model', released.config.model.name)}, trained on"
    f" {_named('data set', released.config.data.name)}.\n",
    "## Privacy\n",
    _privacy(released.ledger, facts),
    "## Plan\n",
    _table([*_plan_rows(released.ledger), *_optimizer_rows(released)]),
    "## Held-out results\n",
    f"On {facts['num_test']:,} examples that were not trained on, and that the"
    " guarantee does not cover.\n",
    _warning(facts),
    _table(_result_rows(facts)),
    *_provenance(released.ledger, released.environment, facts),
    "## Use\n",
    _USE if released.config.model.name != parts_lib.GIVEN else _USE_OF_GIVEN,
  ]
  return "\n".join(parts)


def of_state(
  ledger: ledger_lib.Ledger,
  environment: Mapping[str, Any],
  facts: Mapping[str, Any],
  name: str,
) -> str:
  """Returns the card of what a loop of one's own saved.

  Args:
    ledger: of the run, which is sound.
    environment: what the run ended with; empty if it has not ended.
    facts: from `dpdist.export.session_run.evaluate`, with "params_sha256" and
      "num_parameters".
    name: of the model.
  """
  scores = facts["test"]
  front = yaml.safe_dump(
    {
      "library_name": "dpdist",
      "tags": _tags(facts),
      "metrics": list(scores),
    },
    sort_keys=False,
  )
  results = "The loop logged no held-out metrics at this step.\n"
  if scores:
    rows = [(metric, f"{value:.4f}") for metric, value in scores.items()]
    results = "The loop logged these; nothing was computed anew.\n\n"
    results += _table(rows)
  parts = [
    f"---\n{front}---\n",
    f"# {name}\n",
    f"What a loop of the author's own (`dpdist.Session`) saved after step"
    f" {facts['step']:,}: {facts['num_parameters']:,} numbers.\n",
    "## Privacy\n",
    _privacy(ledger, facts),
    "## Plan\n",
    _table(_plan_rows(ledger)),
    "## Held-out results\n",
    results,
    *_provenance(ledger, environment, facts),
    "## Use\n",
    _USE_OF_GIVEN,
  ]
  return "\n".join(parts)


def _provenance(
  ledger: ledger_lib.Ledger,
  environment: Mapping[str, Any],
  facts: Mapping[str, Any],
) -> list[str]:
  rows = [
    ("SHA-256 of the parameters", f"`{facts['params_sha256']}`"),
    # Not the data's digest: an attacker who knows all examples but one could
    # test guesses.
    ("head of the ledger", f"`{ledger.head}`"),
    *_environment(environment),
  ]
  return ["## Provenance\n", _table(rows)]


def _tags(facts: Mapping[str, Any]) -> list[str]:
  tags = ["jax", "flax", "safetensors", "dp-sgd"]
  if facts["guarantee"] == "holds":
    tags.append("differential-privacy")
  return tags


def _named(kind: str, name: str) -> str:
  if name == parts_lib.GIVEN:
    return f"a {kind} of the author's own"
  return f"`{name}`"


_USE = """\
```python
from dpdist import export

model, params = export.load("DIRECTORY OF THIS FILE")
logits = model.apply({"params": params}, inputs)  # Of one example.
```
"""


_USE_OF_GIVEN = """\
```python
from dpdist import export

_, params = export.load("DIRECTORY OF THIS FILE", template=params_of_the_model)
```
"""


def _front(
  released: load_run.Released, facts: dict[str, Any], name: str
) -> dict[str, Any]:
  is_given = released.config.model.name == parts_lib.GIVEN
  data = released.config.data.name
  if data == parts_lib.GIVEN:
    data = "unnamed"
  scores = facts["test_ema" if facts["uses_ema"] else "test"]
  inputs, task = released.test.get("inputs"), "other"
  if inputs is not None and not is_given:
    task = _TASKS.get(inputs.ndim - 1, "tabular-classification")
    if inputs.dtype.kind == "f" and task == "text-generation":
      task = "tabular-classification"
  return {
    "library_name": "dpdist",
    "tags": _tags(facts),
    "datasets": [data] * (data != "unnamed"),
    "metrics": list(scores),
    "model-index": [
      {
        "name": name,
        "results": [
          {
            "task": {"type": task},
            "dataset": {"name": data, "type": data, "split": "test"},
            "metrics": [
              {"type": metric, "value": value}
              for metric, value in scores.items()
            ],
          }
        ],
      }
    ],
  }


def _privacy(ledger: ledger_lib.Ledger, facts: Mapping[str, Any]) -> str:
  if facts["guarantee"] != "holds":
    why = facts["guarantee"].removeprefix("void:").strip()
    return (
      "> [!CAUTION]\n"
      f"> **No privacy guarantee.** {why[:1].upper()}{why[1:]}. Whoever has"
      " these parameters may learn what is in the training data.\n"
    )
  charged = sum(part.num_steps for part in ledger.spent)
  planned = sum(part.num_steps for part in ledger.planned)
  bound = statement.rounded_up(facts["epsilon"])
  lines = [
    f"**epsilon = {bound}, delta = {facts['delta']:g}**, for all that the run"
    f" has released: {charged:,} of {planned:,} planned steps are charged in"
    " its ledger, which was verified when this was written.\n",
  ]
  if charged < planned:
    reading = statement.rounded_up(facts["epsilon_spent"])
    lines.append(f"{statement.stopped_early(reading)}\n")
  lines.append(composition.statement(ledger.planned, facts["epsilon"]) + "\n")
  return "\n".join(lines)


def _plan_rows(ledger: ledger_lib.Ledger) -> list[tuple[str, str]]:
  plan = ledger.plan
  return [
    (f"{plan.unit}s", f"{plan.num_examples:,}"),
    ("expected batch size", f"{plan.expected_batch_size:,g}"),
    (
      "sampling",
      f"{statement.sampling(plan)}, q = {plan.sampling_probability:.6g}",
    ),
    ("steps", f"{plan.num_steps:,}"),
    ("l2 clip norm", f"{plan.l2_clip_norm:g}"),
    ("noise multiplier", f"{plan.noise_multiplier:g}"),
    ("neighboring relation", plan.neighboring_relation),
    ("accountant", composition.accountant_of(ledger.spent)),
  ]


def _optimizer_rows(released: load_run.Released) -> list[tuple[str, str]]:
  return [
    ("optimizer", released.config.optimizer.name),
    ("learning rate", f"{released.config.optimizer.learning_rate:g}"),
  ]


def _result_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
  this, other = "test", "test_ema"
  if facts["uses_ema"]:
    this, other = other, this
  names = {this: "", other: " of the average" * (other == "test_ema")}
  names[other] = names[other] or " of the parameters as they are"
  return [
    (f"{metric}{names[group]}", f"{value:.4f}")
    for group in (this, other)
    for metric, value in facts.get(group, {}).items()
  ]


def _warning(facts: dict[str, Any]) -> str:
  """Returns what is wrong with the held-out metrics; "" if nothing is."""
  which = "test_ema" if facts["uses_ema"] else "test"
  problem = facts.get("held_out_problems", {}).get(which, "")
  if not problem:
    return ""
  text = f"{problem[:1].upper()}{problem[1:]}"
  return (
    f"> [!WARNING]\n> **{text}.** That its privacy holds is another matter.\n"
  )


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns what the model was trained with, as far as it may be released."""
  if not environment:
    return []
  packages = ", ".join(
    f"{name} {version}" for name, version in environment["packages"].items()
  )
  return [
    ("SHA-256 of dpdist's code", f"`{environment['code_sha256']}`"),
    ("Python and packages", f"{environment['python']}; {packages}"),
    (
      "devices",
      f"{environment['device_kind']}, mesh {json.dumps(environment['mesh'])}",
    ),
  ]


def _table(rows: list[tuple[str, str]]) -> str:
  lines = [f"| {name} | {value} |" for name, value in rows]
  return "\n".join(["| | |", "| --- | --- |", *lines]) + "\n"

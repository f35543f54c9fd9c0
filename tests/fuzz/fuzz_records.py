"""Kinds of inputs: what a run, and a data set's budget, have recorded."""

from collections.abc import Mapping
import json
import pathlib
import random
from typing import Any

from dpdist.files import sealed_json
from dpdist.ledger import budgets
from dpdist.ledger import data_budget
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.ledger import records
from dpdist.privacy import plan as plan_lib
from dpdist.workdir import manifest
from tests.fuzz import mangle
from tests.fuzz import outcomes
from tests.support import commands

_DATA = "d" * 64


def plan(**changes: Any) -> plan_lib.PrivacyPlan:
  """A small one, whose epsilon takes no time."""
  given = {
    "num_examples": 100,
    "expected_batch_size": 10,
    "num_steps": 40,
    "l2_clip_norm": 1.0,
    "target_delta": 1e-5,
    "noise_multiplier": 1.0,
    "accountant": "rdp",
  }
  return plan_lib.make_plan(plan_lib.PrivacyConfig(**{**given, **changes}))


def _config(plan: plan_lib.PrivacyPlan) -> dict[str, Any]:
  values = plan.to_dict()
  values["target_delta"] = values.pop("delta")
  return plan_lib.PrivacyConfig(**values).to_dict()


def write_run(workdir: pathlib.Path, root: pathlib.Path) -> None:
  """A run with a record of every kind, checkpoints and all that it tells."""
  budget = data_budget.DataBudget(root, _DATA)
  budget.make(epsilon=50, delta=1e-4, neighboring_relation="add_or_remove_one")
  budget.reserve("search", 1e-3, 2)
  first, second = plan(), plan(noise_multiplier=2.0, num_steps=30)
  with ledger_lib.Ledger(workdir / "ledger") as ledger:
    ledger.acquire()
    ledger.open(
      config=_config(first),
      plan=first,
      data=_DATA,
      secret_hash="5" * 64,
      run="r",
    )
    ledger.record_allocation(root=budget.root, data=_DATA, allocation="")
    allocation = budget.allocate(
      ledger,
      [plan_lib.PlanUse(first, 40), plan_lib.PlanUse(second, 30)],
      label="run",
    )
    ledger.record_allocation(
      root=budget.root, data=_DATA, allocation=allocation
    )
    ledger.notice("something to be told")
    for segment in (first, second):
      if segment is second:
        ledger.open_segment(
          config=_config(second), plan=second, data=_DATA, start_step=2
        )
      ledger.resume(
        step=2 * (segment is second),
        digest="",
        ledger_head="",
        fingerprint=str(segment.noise_multiplier),
      )
      ledger.reserve_through(5)
      ledger.refund(4)
      budget.advance(ledger)
      _save(workdir, ledger, 4 if segment is second else 2)
    ledger.record_epsilons(
      spent={"pld": None, "rdp": 1.0}, planned={"pld": None, "rdp": 2.0}
    )
    result = {"epsilon": 1.0, "steps_charged": 6, "guarantee": "holds"}
    (workdir / "result.json").write_text(json.dumps(result))
    row = {"epsilon": 0.5, "learning_rate": 0.1}
    (workdir / "metrics.jsonl").write_text(
      "".join(json.dumps({"step": t, **row}) + "\n" for t in (1, 2, 3))
    )


def _save(workdir: pathlib.Path, ledger: ledger_lib.Ledger, step: int) -> None:
  saved = history.CheckpointRef(step, "", ledger.writer)
  path = manifest.location(workdir / "checkpoints", saved)
  for name, text in {
    "meta/metadata": json.dumps({"step": step, "ledger_head": ledger.head}),
    "_CHECKPOINT_METADATA": json.dumps({"item_handlers": {"state": "x"}}),
    f"state/d/{step}": "x" * 300,
  }.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(text)
  ledger.record_checkpoint(step, manifest.write(path))


def resealed(
  values: Mapping[str, bytes], number: int, record: dict[str, Any]
) -> dict[str, bytes]:
  """A log in which a record says something else, and all hashes are right."""
  names = sorted(name for name in values if name != "head.json")
  sealed, head = {}, records.FIRST
  for i, name in enumerate(names):
    body = dict(json.loads(values[name]))
    if i == number:
      body = dict(record)
    elif i > number or number < 0:
      body["prev"] = head
    body.pop("sha256", None)
    sealed[name] = sealed_json.seal(body)
    head = sealed_json.digest(sealed[name])
  body = dict(json.loads(values["head.json"]))
  body.pop("sha256")
  sealed["head.json"] = sealed_json.seal({**body, "head": head})
  return sealed


class Logs:
  """A folder in which a log is put, damaged, for each input."""

  def __init__(self, folder: pathlib.Path):
    self.workdir, self.root = folder / "run", folder / "budgets"
    write_run(self.workdir, self.root)
    self.ledger = outcomes.snapshot(self.workdir / "ledger")
    self.budget = outcomes.snapshot(self.root / _DATA)
    self.checkpoints = outcomes.snapshot(self.workdir / "checkpoints")
    ledger = ledger_lib.Ledger(self.workdir / "ledger")
    self.spent = ledger.spent_steps
    # As of a writer that was killed after it wrote the newest record.
    head = dict(json.loads(self.ledger["head.json"]))
    head |= {"seq": len(ledger.records) - 1, "head": ledger._log.heads[-2]}
    head.pop("sha256")
    self.head_before = sealed_json.seal(head)

  def held(
    self, folder: pathlib.Path, files: dict[str, bytes], act: Any
  ) -> str:
    """Acts on a folder that holds these files, and must hold them after."""
    outcomes.put(folder, files)
    outcome = act()
    if outcomes.snapshot(folder) != files:
      raise outcomes.FaultError(f"{folder.name}: what was recorded was changed")
    return outcome


def _damaged(rng: random.Random, files: dict[str, bytes]) -> dict[str, bytes]:
  """Files of a log as a disk, a kill or a person may have left them."""
  changed = dict(files)
  names = sorted(changed)
  name = rng.choice(names)
  roll = rng.random()
  if roll < 0.6:
    changed[name] = mangle.file(rng, changed[name])
  elif roll < 0.7:
    del changed[name]
  elif roll < 0.8:
    changed[name] = changed[rng.choice(names)]
  elif roll < 0.9:
    stray = rng.choice(["000000000099.json", "x", "0.json", "head.json.tmp"])
    changed[stray] = changed[name]
  else:
    del changed[name]
    changed[rng.choice(names)] = mangle.file(rng, files[name])
  return changed


def record(folder: pathlib.Path) -> outcomes.Kind:
  """A ledger's files, damaged: found, or what was charged still is."""
  logs = Logs(folder)

  def one(rng: random.Random) -> str:
    files = dict(logs.ledger)
    if rng.random() < 0.3:
      files["head.json"] = logs.head_before
      last = max(name for name in files if name != "head.json")
      files[last] = mangle.file(rng, files[last])
    else:
      files = _damaged(rng, files)

    def check(ledger: ledger_lib.Ledger) -> None:
      if ledger.spent_steps < logs.spent and set(files) >= set(logs.ledger):
        raise outcomes.FaultError(
          f"{ledger.spent_steps} steps of {logs.spent} were charged"
        )

    path = logs.workdir / "ledger"
    return logs.held(
      path,
      files,
      lambda: outcomes.tried(lambda: ledger_lib.Ledger(path), check),
    )

  return one


def _read_all(ledger: ledger_lib.Ledger) -> None:
  """Looks at all that a ledger says."""
  values = [ledger.spent_steps, ledger.guarantee, ledger.epsilons]
  values += [
    ledger.allocations,
    ledger.checkpoints,
    ledger.branches,
    ledger.writer,
  ]
  if not ledger.is_new:
    values += [ledger.spent, ledger.planned, ledger.plan.fingerprint()]
    if ledger.branches:
      values += [ledger.last_step, ledger.spent_through(1)]
  repr(values)


def _other(rng: random.Random, values: dict[str, bytes]) -> dict[str, bytes]:
  names = sorted(name for name in values if name != "head.json")
  number = rng.randrange(len(names))
  changed = mangle.fields(rng, json.loads(values[names[number]]))
  return resealed(values, number, changed)


def sealed_record(folder: pathlib.Path) -> outcomes.Kind:
  """Records that say other things, with hashes that are right."""
  logs = Logs(folder)

  def one(rng: random.Random) -> str:
    path = logs.workdir / "ledger"

    def read() -> ledger_lib.Ledger:
      ledger = ledger_lib.Ledger(path)
      if not ledger.is_new:
        ledger.changes(
          config=ledger.segment.config,
          data=ledger.segment.data,
          secret_hash=ledger.secret_hash,
        )
      return ledger

    try:
      files = _other(rng, logs.ledger)
    except (ValueError, TypeError):  # It is no JSON: nothing could seal it.
      return "unsealable"
    return logs.held(path, files, lambda: outcomes.tried(read, _read_all))

  return one


def head(folder: pathlib.Path) -> outcomes.Kind:
  """A head that is damaged, or says something else and is sealed."""
  logs = Logs(folder)

  def one(rng: random.Random) -> str:
    files = dict(logs.ledger)
    if rng.random() < 0.5:
      files["head.json"] = mangle.file(rng, files["head.json"])
    else:
      changed = mangle.fields(rng, json.loads(files["head.json"]))
      changed.pop("sha256", None)
      try:
        files["head.json"] = sealed_json.seal(changed)
      except (ValueError, TypeError):
        return "unsealable"
    path = logs.workdir / "ledger"

    def use() -> ledger_lib.Ledger:
      ledger = ledger_lib.Ledger(path)
      ledger.confirm()
      return ledger

    return logs.held(path, files, lambda: outcomes.tried(use, _read_all))

  return one


def _all_budgets(root: pathlib.Path) -> list[Any]:
  found = budgets.all_below(root)
  for budget in found:
    if budget.terms is not None:
      repr([budget.reserved, budget.epsilon, budget.reservations])
      repr(
        [
          budget.share(allocation.cost)
          for allocation in budget.allocations.values()
        ]
      )
  return found


def budget(folder: pathlib.Path) -> outcomes.Kind:
  """A data set's budget, likewise."""
  logs = Logs(folder)

  def one(rng: random.Random) -> str:
    if rng.random() < 0.4:
      files = _damaged(rng, logs.budget)
    else:
      try:
        files = _other(rng, logs.budget)
      except (ValueError, TypeError):
        return "unsealable"
    return logs.held(
      logs.root / _DATA,
      files,
      lambda: outcomes.tried(lambda: _all_budgets(logs.root), repr),
    )

  return one


def verify(folder: pathlib.Path) -> outcomes.Kind:
  """`launch.verify` and `launch.budget` on a directory with something wrong."""
  logs = Logs(folder)
  commands_of = [
    commands.Command("verify"),
    commands.Command("budget"),
  ]
  others = {
    name: (logs.workdir / name).read_bytes()
    for name in ("result.json", "metrics.jsonl")
  }

  def one(rng: random.Random) -> str:
    files = {
      **{f"ledger/{k}": v for k, v in logs.ledger.items()},
      **{f"checkpoints/{k}": v for k, v in logs.checkpoints.items()},
      **others,
    }
    roll = rng.random()
    try:
      if roll < 0.3:
        name = rng.choice(["result.json", "metrics.jsonl"])
        files[name] = mangle.file(rng, files[name])
      elif roll < 0.5:
        name = rng.choice([x for x in files if x.startswith("checkpoints/")])
        files[name] = mangle.file(rng, files[name])
        if rng.random() < 0.7:
          files = with_its_manifest(files, name)
      else:
        change = _other if roll < 0.9 else _damaged
        for name, data in change(rng, logs.ledger).items():
          files[f"ledger/{name}"] = data
    except (ValueError, TypeError):
      return "unsealable"
    outcomes.put(logs.workdir, files)
    workdir = f"--workdir={logs.workdir}"
    command = commands_of[rng.random() < 0.3]
    extra = rng.choice([(), ("--json",)])
    outcome, _ = outcomes.opened(command, workdir, *extra)
    if outcomes.snapshot(logs.workdir) != files:
      raise outcomes.FaultError(f"{command.name}: what was there was changed")
    return outcome

  return one


def with_its_manifest(files: dict[str, bytes], name: str) -> dict[str, bytes]:
  """As if the checkpoint had been saved so, and recorded."""
  parts = name.split("/")
  folder = "/".join(parts[:3]) + "/"
  text = files[folder + "dpdist_manifest.json"]
  if not name.endswith("dpdist_manifest.json"):
    digests = json.loads(text)
    digests[name.removeprefix(folder)] = sealed_json.digest(files[name])
    text = json.dumps(digests, sort_keys=True, indent=1).encode()
  was = sealed_json.digest(files[folder + "dpdist_manifest.json"])
  if name.endswith("dpdist_manifest.json"):
    was = ""  # Both checkpoints' records will do.
  changed = {**files, folder + "dpdist_manifest.json": text}
  log = {
    k.removeprefix("ledger/"): v
    for k, v in files.items()
    if k.startswith("ledger/")
  }
  for number, key in enumerate(sorted(log)[:-1]):
    body = json.loads(log[key])
    if body["kind"] == "checkpoint" and was in ("", body["digest"]):
      body["digest"] = sealed_json.digest(text)
      log = resealed(log, number, body)
  return changed | {f"ledger/{k}": v for k, v in log.items()}


KINDS = {
  "record": record,
  "sealed_record": sealed_record,
  "head": head,
  "budget": budget,
  "verify": verify,
}

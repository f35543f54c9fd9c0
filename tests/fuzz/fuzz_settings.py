"""Kinds of inputs: settings, files of settings, and flags of every command."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import json
import pathlib
import random
from typing import Any

from dpdist.accounting import calibration
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import plan as plan_lib
from tests.fuzz import fuzz_records
from tests.fuzz import mangle
from tests.fuzz import outcomes
from tests.support import commands

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DIGITS = f"--config={_ROOT}/configs/digits.py"
_FIELDS = [field.name for field in dataclasses.fields(plan_lib.PrivacyConfig)]
_OF_WORDS = ("accountant", "neighboring_relation", "sampling", "unit")
_OF_INTEGERS = (
  *("num_examples", "num_steps", "truncated_batch_size", "cycle_length"),
  *("examples_per_user", "group_size"),
)
_WORDS = (
  *("poisson", "fixed_size", "truncated_poisson", "cyclic_poisson", "user"),
  *("pld", "rdp", "replace_one", "zero_out", "add_or_remove_one", "example"),
)


def _setting(rng: random.Random, name: str) -> Any:
  """A value of a field, of which half may be right."""
  roll = rng.random()
  if roll < 0.3:
    return mangle.value(rng)
  if name in _OF_WORDS or roll < 0.35:
    return rng.choice(_WORDS)
  if name.endswith("_schedule"):
    pairs = [
      (rng.choice([1, 2, 5, 0, -1, 1.5, "1"]), rng.choice(mangle.NUMBERS))
      for _ in range(rng.randrange(4))
    ]
    return rng.choice([pairs, dict(pairs), tuple(pairs), [1, 2], pairs[:1] * 2])
  if name in _OF_INTEGERS and roll < 0.9:
    return rng.choice([1, 2, 3, 5, 10, 400, 1438, 10**9])
  return rng.choice([1, 2, 3, 5, 10, 0.5, 1e-5, 1e-9, 0.999, 1.0, 4.0, 1e9])


def plan(folder: pathlib.Path) -> outcomes.Kind:
  """Privacy settings: refused, or a plan that is read back as it was."""
  del folder
  right = fuzz_records.plan().to_dict() | {"target_epsilon": None}
  right["target_delta"] = right.pop("delta")

  def one(rng: random.Random) -> str:
    settings = dict(right)
    for name in rng.sample(_FIELDS, rng.choice([1, 1, 2, 3, 5])):
      if name != "target_epsilon":  # It would be calibrated, which takes long.
        settings[name] = _setting(rng, name)

    def check(made: plan_lib.PrivacyPlan) -> None:
      again = plan_lib.PrivacyPlan.from_dict(
        json.loads(json.dumps(made.to_dict(), allow_nan=False))
      )
      if again != made or again.fingerprint() != made.fingerprint():
        raise outcomes.FaultError(f"{made} was read back as {again}")
      if not 0 < made.sampling_probability <= 1 or not made.steps():
        raise outcomes.FaultError(f"no such plan: {made}")

    return outcomes.tried(
      lambda: plan_lib.make_plan(plan_lib.PrivacyConfig(**settings)), check
    )

  return one


def epsilon(folder: pathlib.Path) -> outcomes.Kind:
  """The accountants at the ends of their ranges: refused, or a bound."""
  del folder

  def one(rng: random.Random) -> str:
    given = {
      "noise_multiplier": rng.choice(
        [1.0, 1e-3, 0.0, 1e-200, 50.0, 1e12, 1e300]
      ),
      "sampling_probability": rng.choice([1.0, 0.5, 1e-3, 1e-12, 1e-300, 0.0]),
      "num_steps": rng.choice([0, 1, 2, 100, 10**6, 10**12, 10**30, 10**400]),
      "delta": rng.choice([1e-5, 0.5, 1e-15, 1e-300, 5e-324, 1 - 1e-16, 1.0]),
      "accountant": rng.choice(["rdp", "rdp", "pld"]),
    }
    if rng.random() < 0.4:
      given[rng.choice(sorted(given))] = mangle.value(rng)

    def check(found: float) -> None:
      if not (isinstance(found, float) and found >= 0):
        raise outcomes.FaultError(f"{given} gave {found!r}")
      spends = given["num_steps"] and given["noise_multiplier"] < 1e9
      spends = spends and given["delta"] <= 1e-5
      if spends and given["sampling_probability"] == 1.0 and not found:
        raise outcomes.FaultError(f"{given} gave nothing spent")

    return outcomes.tried(lambda: calibration.epsilon(**given), check)

  return one


def _config_text(rng: random.Random, right: str) -> bytes:
  """A file of settings in Python, that may be no such file."""
  roll = rng.random()
  if roll < 0.35:
    return mangle.raw(rng, right.encode())
  if roll < 0.7:
    lines = right.splitlines()
    at = rng.randrange(len(lines))
    extra = rng.choice(
      [
        *(
          "  raise KeyError('x')",
          "  return None",
          "  return 3",
          "  return {}",
        ),
        *(
          "def get_config(",
          "import nothing_like_it",
          "  1 / 0",
          "\0",
          "  x =",
        ),
        *(
          "  config.privacy.num_steps = 'x'",
          "  config.nothing = 1",
          "  return",
        ),
        *(
          "  config.privacy = 3",
          "  del config.privacy",
        ),
        *(
          "  config.privacy.num_steps += 0.5",
          "  return config.lock()",
          "\t x",
        ),
        *("  config.privacy.nothing = 3", "  get_config()", "assert False"),
        *("  config.privacy.target_epsilon = [1]", "  config.data = None"),
      ]
    )
    kept = lines[at + rng.choice([0, 1]) :]
    return "\n".join([*lines[:at], extra, *kept]).encode()
  return rng.choice([b"", b"\xff\xfe", b"x", b"get_config = 3", right.encode()])


def config_file(folder: pathlib.Path) -> outcomes.Kind:
  """Files in place of configs/digits.py, for `launch.budget`."""
  command = commands.Command("budget")
  right = (_ROOT / "configs" / "digits.py").read_text()

  def one(rng: random.Random) -> str:
    path = folder / f"config{rng.randrange(10**9)}.py"
    path.write_bytes(_config_text(rng, right))
    if rng.random() < 0.05:
      path = folder / rng.choice(["", "gone.py", "x" * 300, "\0"])
    outcome, _ = outcomes.opened(
      command, f"--config={path}", "--config.privacy.accountant=rdp"
    )
    return outcome

  return one


def _shown(value: Any) -> str:
  return str(value)[:6000].replace("\0", "")


def settings(folder: pathlib.Path) -> outcomes.Kind:
  """Flags that change privacy settings, for `launch.budget`."""
  command = commands.Command("budget")
  # The noise is given, since to find it takes longer.
  (folder / "given.py").write_text(
    "from configs import digits\n\n\ndef get_config():\n"
    "  config = digits.get_config()\n"
    "  config.privacy.update(\n"
    "    target_epsilon=None, noise_multiplier=1.5, accountant='rdp')\n"
    "  return config\n"
  )

  def one(rng: random.Random) -> str:
    flags = [f"--config={folder}/given.py"]
    for name in rng.sample(_FIELDS, rng.choice([1, 1, 2, 3])):
      value = _shown(_setting(rng, name))
      flags.append(f"--config.privacy.{name}={value}")
    if rng.random() < 0.1:
      rng.shuffle(flags)
    outcome, _ = outcomes.opened(
      command, *flags, *rng.choice([(), ("--json",)])
    )
    return outcome

  return one


# Flags that no command takes; what it needs otherwise is in `_NEEDS`.
_WRONG = (
  *("--nothing", "--config.nothing=1", "--config.privacy.num_steps=x", "stray"),
  *("--config.privacy=3", "--config.privacy.num_steps=1.5", "--json=maybe"),
  *("--config=", "--config=nothing.py", "--workdir", "--config.data.x=1"),
  *("--config.privacy.num_steps=-1", "--config.privacy.num_steps=0", "-"),
  *("--config.privacy.target_delta=2", "--config.privacy.target_epsilon=nan"),
  *("--config.privacy.expected_batch_size=1e9", "--config.privacy.unit=x"),
  *("--config.optimizer.options=3", "--config..=1", "--config.a..b=1"),
  *("--flagfile=/nothing", "--undefok=1,=", "---", "--=", "--config.=x"),
  *("--config.privacy.noise_schedule=x", "--config.insecure_seed=x"),
  *("--config.insecure_seed=1.5", "--config.data=None", "--noconfig"),
)
_NEEDS: dict[str, list[str]] = {
  "budget": [_DIGITS, "--config.privacy.accountant=rdp"],
  "verify": ["--workdir={folder}/nothing"],
  "reserve": [
    *(_DIGITS, "--count=2", "--label=x", "--config.privacy.accountant=rdp"),
    "--config.data_budget.location={folder}/budgets",
  ],
  "fetch": ["--name=chitchat", "--file={folder}/nothing"],
  "submit": [_DIGITS, "--to=slurm", "--workdir=/x", "--dry_run"],
  "local": ["--num_processes=1", "--", _DIGITS, "--process_id=0"],
  "engines.ray_driver": ["--nodes=0", "--", _DIGITS],
  "train": [
    *(_DIGITS, "--workdir={folder}/run", "--config.data.name=npz"),
    *("--config.data.path={folder}/nothing", "--start_timeout=1"),
  ],
  "bench": [_DIGITS, "--topology=x9:1x1"],
  "audit": [_DIGITS, "--mode=worst_case"],
  "eval": ["--workdir={folder}/nothing"],
  "export": ["--workdir={folder}/nothing", "--output={folder}/out"],
}
_VALUES = (
  *(
    "",
    "x",
    "0",
    "-1",
    "1e5",
    "None",
    "nan",
    "9" * 30,
    "é",
    "a,b",
    "/dev/null",
    "true",
  ),
  *("'", '"', "$(x)", "x\ny", "..", "1" * 3000, "slurm", "jobset", "ray"),
)


def command_flags(name: str, folder: pathlib.Path) -> outcomes.Kind:
  """A command whose flags are gone, twice there, or hold something else."""
  command = commands.Command(name)
  needs = [flag.replace("{folder}", str(folder)) for flag in _NEEDS[name]]
  own = sorted(command.flags)
  # What a command writes there, or above, is gone with the folder.
  cwd = folder / "where" / "it" / "is"
  cwd.mkdir(parents=True)

  def one(rng: random.Random) -> str:
    flags = list(needs)
    for _ in range(rng.choice([1, 1, 2, 3])):
      roll = rng.random()
      if roll < 0.5:
        flags.insert(
          rng.randrange(len(flags) + 1),
          f"--{rng.choice(own)}={rng.choice(_VALUES)}",
        )
      elif roll < 0.7:
        flags.insert(rng.randrange(len(flags) + 1), rng.choice(_WRONG))
      elif roll < 0.85 and flags:
        flags.pop(rng.randrange(len(flags)))
      elif flags:
        flags.append(rng.choice(flags))
    if name == "submit":
      flags.append("--dry_run")  # The last one counts.
    if name == "train":
      flags.append("--config.data.name=npz")  # There is none, so none trains.
    if name == "audit":
      flags.append("--config.privacy.num_steps=-1")  # It would take minutes.
    if name in ("local", "engines.ray_driver"):
      # Never what could start: the processes are told who they are elsewhere.
      if "--" not in flags:
        flags.append("--")
      flags.append("--process_id=0")
    if name == "engines.ray_driver":
      flags.insert(flags.index("--"), "--nodes=0")
    with contextlib.chdir(cwd):
      outcome, _ = outcomes.opened(command, *flags)
    return outcome

  return one


_SECTIONS = ("data", "model", "clipping", "optimizer", "mesh")
_NAMES = (
  *("digits", "npz", "text", "linear", "cnn", "random_features", "decoder"),
  *("auto", "vmap", "two_pass", "bookkeeping", "sgd", "adam", "adamw", "lbfgs"),
  *("constant", "cosine", "linear", "float32", "bfloat16", "float8_e4m3fn"),
)


def job(folder: pathlib.Path) -> outcomes.Kind:
  """All other settings: refused before anything is charged, or a job."""
  from configs import digits
  from dpdist.training import job as job_lib

  def one(rng: random.Random) -> str:
    config = digits.get_config()
    config.privacy.update(
      target_epsilon=None, noise_multiplier=1.5, accountant="rdp"
    )
    config.insecure_seed = 7
    for _ in range(rng.choice([1, 2, 3, 4])):
      section = rng.choice([config, *(config[name] for name in _SECTIONS)])
      name = rng.choice(sorted(section))
      if name in _SECTIONS or name in ("privacy", "ledger", "secret_file"):
        continue
      value = rng.choice(
        [*mangle.NUMBERS, *mangle.TEXTS, *_NAMES, *_NAMES, 1, 2, 8, 64]
      )
      try:
        section[name] = value
      except (TypeError, OverflowError):
        continue  # As a flag, it would have been refused.
    workdir = folder / f"run{rng.randrange(10**9)}"
    ledger = ledger_lib.Ledger(workdir / "ledger")

    def check(made: job_lib.Job) -> None:
      made.close()
      if ledger.spent_steps:
        raise outcomes.FaultError("steps were charged")

    with ledger:
      outcome = outcomes.tried(
        lambda: job_lib.prepare(config, workdir, ledger), check
      )
    if outcome == "refused" and not ledger.is_new:
      raise outcomes.FaultError("refused, and the ledger was written to")
    return outcome

  return one


KINDS: dict[str, Callable[[pathlib.Path], outcomes.Kind]] = {
  "plan": plan,
  "epsilon": epsilon,
  "config_file": config_file,
  "settings": settings,
  "job": job,
  **{
    f"flags_{name}": functools.partial(command_flags, name) for name in _NEEDS
  },
}

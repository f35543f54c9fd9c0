"""A few inputs of each kind, and that what looks at outcomes sees bad ones.

`python -m tests.fuzz.fuzz` tries as many as one likes.
"""

import json

import pytest

from dpdist import config as config_lib
from dpdist import errors
from dpdist.files import json_fields
from dpdist.ledger import ledger as ledger_lib
from dpdist.workdir import manifest
from dpdist.workdir import verify
from tests.fuzz import fuzz
from tests.fuzz import fuzz_kinds
from tests.fuzz import fuzz_records
from tests.fuzz import outcomes

_SEED = 26
# Of the dear kinds, a fraction.
_INPUTS = {
  **dict.fromkeys(fuzz_kinds.KINDS, 25),
  **{"epsilon": 8, "settings": 8, "config_file": 12, "verify": 12},
  **{name: 4 for name in fuzz_kinds.KINDS if name.startswith("flags_")},
}
# These import jax, and more.
_APART = (
  *("flags_train", "flags_bench", "flags_audit", "flags_eval"),
  *("flags_export", "job"),
)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in _APART))
    for name in fuzz_kinds.KINDS
  ],
)
def test_an_answer_or_one_clear_error(name, tmp_path):
  kind = fuzz.make(name, tmp_path)
  _, faults = outcomes.run(kind, name, inputs=range(_INPUTS[name]), seed=_SEED)
  assert not faults, "\n".join(faults[:3])


# What is a fault.


def _raises(error):
  def call():
    raise error

  return call


@pytest.mark.parametrize(
  "error",
  [
    KeyError("x"),
    IndexError("list index out of range"),
    TypeError("unhashable"),
    AttributeError("no attribute"),
    RecursionError("too deep"),
    MemoryError(),
    OverflowError("too large"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    json.JSONDecodeError("Expecting value", "", 0),
    # The package's kind, but not raised by the package.
    ValueError("whatever it is"),
    errors.LedgerError("raised here"),
  ],
)
def test_what_is_no_error_of_the_package_is_a_fault(error):
  with pytest.raises(outcomes.FaultError):
    outcomes.tried(_raises(error), repr)


def test_an_error_of_the_package_is_none(tmp_path):
  assert (
    outcomes.tried(lambda: json_fields.parse(b"[]", "x"), repr) == "refused"
  )
  assert outcomes.tried(lambda: 1, repr) == "answered"
  command = lambda text: lambda *flags: outcomes.commands.Outcome(2, "", text)
  for text in (
    *("", "error: a\nerror: b\n", "Traceback\nerror: x", "x\n"),
    *("error: a\ntry: b\ntry: c\n", "try: a\nerror: b\n"),
  ):
    call = command(text)
    call.name = "x"
    with pytest.raises(outcomes.FaultError):
      outcomes.opened(call)
  call = command("error: one line\nTry --help.\n")
  call.name = "x"
  assert outcomes.opened(call)[0] == "refused"
  call = command("error: one line\ntry: this\n")
  call.name = "x"
  assert outcomes.opened(call)[0] == "refused"


def test_what_takes_too_long_is_a_fault(monkeypatch):
  monkeypatch.setattr(outcomes, "_SECONDS", 0.05)

  def forever(rng):
    while True:
      rng.random()

  _, faults = outcomes.run(forever, "x", inputs=range(1), seed=0)
  assert "took longer" in faults[0]


def test_a_record_that_was_changed_by_looking_is_a_fault(tmp_path):
  logs = fuzz_records.Logs(tmp_path)
  path = logs.workdir / "ledger"

  def harm():
    (path / "000000000003.json").write_bytes(b"")
    return "answered"

  with pytest.raises(outcomes.FaultError, match="was changed"):
    logs.held(path, logs.ledger, harm)


# What was found, each mended.


@pytest.fixture(name="run")
def fixture_run(tmp_path):
  fuzz_records.write_run(tmp_path / "run", tmp_path / "budgets")
  return tmp_path / "run"


def _findings(run):
  found = verify.verify(run, ledger_lib.Ledger(run / "ledger"))
  return {finding.what: finding for finding in found}


def test_a_result_that_is_no_json_is_a_finding(run):
  for text in (b"", b"[" * 100_000, b"\xff", b"[1]", b"{"):
    (run / "result.json").write_bytes(text)
    assert "cannot be read" in _findings(run)["result"].problem


def test_metrics_that_are_none_are_a_finding(run):
  huge = b'{"step": 1, "epsilon": 1' + b"0" * 400 + b"}"
  for line in (huge, b"[" * 100_000):
    (run / "metrics.jsonl").write_bytes(line + b"\n" + b'{"step": 1}\n')
    assert "metrics.jsonl:1" in _findings(run)["metrics"].problem


def test_metadata_without_a_ledger_head_is_a_finding(run):
  saved = ledger_lib.Ledger(run / "ledger").checkpoints[-1]
  path = manifest.location(run / "checkpoints", saved)
  for text in (b"{}", b"[]", b'{"ledger_head": 3}', b"\xff"):
    (path / "meta" / "metadata").write_bytes(text)
    heads = manifest.ledger_heads(run / "checkpoints")
    assert len(heads) == 1
    files = outcomes.snapshot(run)
    name = f"{path.relative_to(run)}/meta/metadata"
    outcomes.put(run, fuzz_records.with_its_manifest(files, name))
    found = _findings(run)["checkpoints"]
    assert "ledger_head" in found.problem + found.found or (
      "metadata" in found.problem
    )
    outcomes.put(run, files)


@pytest.mark.parametrize(
  ("record", "problem"),
  [
    ({"kind": "reserve", "branch": 0, "stop_step": 0.5}, "stop_step must be"),
    ({"kind": "reserve", "branch": False, "stop_step": 1}, "branch must be"),
    ({"kind": "branch", "branch": 1, "start_step": True}, "start_step must be"),
    ({"kind": "stake", "root": 3, "data": "", "stake": ""}, "root must be"),
    ({"kind": "epsilons", "spent": [], "planned": {}}, "spent must be"),
    ({"kind": "epsilons", "spent": {"pld": "1"}, "planned": {}}, "no number"),
    ({"kind": "notice"}, "text must be there"),
    ({"kind": "nothing"}, "kind 'nothing'"),
  ],
)
def test_fields_of_another_kind_are_no_record(run, record, problem):
  with ledger_lib.Ledger(run / "ledger") as ledger:
    with pytest.raises(ValueError, match=problem):
      ledger.check(record)
    ledger.acquire()
    ledger._log._apply = lambda record: None
    kind = record.pop("kind")
    ledger._log.append(kind, **record)
  with pytest.raises(errors.LedgerError, match=problem):
    ledger_lib.Ledger(run / "ledger")


@pytest.mark.parametrize("value", [3.0, True, -1, 2**63, "3", None, [3]])
def test_a_whole_number_is_one_and_no_other(value):
  with pytest.raises(ValueError, match="n must be of kind int"):
    json_fields.check({"n": value}, {"n": int})
  json_fields.check(
    {"n": 3},
    {"n": int},
  )


def test_a_file_of_settings_has_those_that_there_are():
  config = config_lib.default()
  config_lib.check(config)
  config.optimizer.options.momentum = 0.9
  config_lib.check(config)
  config.privacy.num_stpes = 3
  with pytest.raises(ValueError, match="num_stpes"):
    config_lib.check(config)
  for name in ("privacy", "data"):
    config = config_lib.default()
    del config[name]
    with pytest.raises(ValueError, match=name):
      config_lib.check(config)
    config[name] = 3
    with pytest.raises(ValueError, match=f"config.{name} must be"):
      config_lib.check(config)
  with pytest.raises(ValueError, match="got a NoneType"):
    config_lib.check(None)

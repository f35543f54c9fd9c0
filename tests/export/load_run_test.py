"""What is said of a run from outside: its checkpoints, its model, its card."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors
import yaml

from configs import digits
import dpdist
from dpdist import errors
from dpdist.export import export
from dpdist.export import load_run
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.reporting import metrics
from tests.support import commands

pytestmark = pytest.mark.usefixtures("quick_compiles")


def _config():
  config = digits.get_config()
  config.model.width = 16
  config.privacy.num_steps = 4
  config.privacy.expected_batch_size = 32
  config.privacy.accountant = "rdp"
  config.optimizer.name = "adam"
  config.optimizer.learning_rate = 0.1
  config.ema_decay = 0.5
  config.eval_every = 2
  config.checkpoint_every = 2
  return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  return workdir, dpdist.train(_config(), workdir)


@pytest.fixture(scope="module")
def found(run):
  return _load(run[0])


@pytest.fixture(scope="module")
def scores(found):
  return load_run.evaluate(found)


@pytest.fixture
def copy(run, tmp_path):
  """To be damaged."""
  return pathlib.Path(shutil.copytree(run[0], tmp_path / "run"))


def _load(workdir, **changes):
  return load_run.load(
    workdir, ledger_lib.Ledger(workdir / "ledger"), **changes
  )


def _files(workdir):
  return {
    path: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in workdir.rglob("*")
    if path.is_file()
  }


@pytest.mark.slow
def test_newest_checkpoint_scores_as_the_run_said(run, scores):
  _, result = run
  facts = scores
  assert facts["step"] == 4
  assert facts["num_test"] == 359
  for group in ("test", "test_ema"):
    assert facts[group] == pytest.approx(result[group])
  assert facts["test"] != facts["test_ema"]
  assert facts["epsilon"] == result["epsilon"]
  assert facts["guarantee"] == "holds"


@pytest.mark.slow
def test_an_older_checkpoint_scores_as_it_did_then(run):
  facts = load_run.evaluate(_load(run[0], step=2))
  (row,) = (row for row in metrics.read(run[0]) if row["step"] == 2)
  for group in ("test", "test_ema"):
    for name, value in facts[group].items():
      assert value == pytest.approx(row[f"{group}/{name}"])
  # Of all that may have been released by now, not by then.
  assert facts["epsilon"] == run[1]["epsilon"] > row["epsilon"]


def test_looking_changes_nothing_and_spends_nothing(run, scores, tmp_path):
  before = _files(run[0])
  export.write(_load(run[0]), scores, tmp_path / "model", name="m")
  assert _files(run[0]) == before


def test_the_command_for_held_out_metrics(run):
  workdir, result = run
  done = commands.run("eval", f"--workdir={workdir}", "--json")
  assert done.code == 0, done.err
  assert json.loads(done.out)["test"] == pytest.approx(result["test"])
  done = commands.run("eval", f"--workdir={workdir}", "--step=3")
  assert done.code == 2
  assert "one of [2, 4], got 3" in done.err


def test_the_command_for_export(run, tmp_path):
  workdir, _ = run
  output = f"--output={tmp_path / 'model'}"
  done = commands.run("export", f"--workdir={workdir}", output, "--name=digits")
  assert done.code == 0, done.err
  assert "# digits" in (tmp_path / "model" / "README.md").read_text()
  written = safetensors.load_file(tmp_path / "model" / "model.safetensors")
  assert sum(x.size for x in written.values()) > 0
  # A directory that holds something is left alone.
  done = commands.run("export", f"--workdir={workdir}", output)
  assert done.code == 2


def test_only_a_checkpoint_that_is_there_can_be_had(run):
  with pytest.raises(ValueError, match=r"one of \[2, 4\], got 3"):
    _load(run[0], step=3)


@pytest.mark.parametrize("what", ["result", "checkpoint", "metrics"])
def test_an_unsound_record_is_refused(copy, what):
  if what == "result":
    path = copy / "result.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"epsilon": 0.1}))
  elif what == "metrics":
    with open(copy / "metrics.jsonl", "a") as file:
      file.write('{"step": 5, "epsilon": 1.0}\n')
  else:
    (path,) = copy.glob("checkpoints/*/4/state/manifest.ocdbt")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
  with pytest.raises(errors.UnsoundError, match=what):
    _load(copy)


def test_a_damaged_ledger_is_refused(copy):
  record = sorted((copy / "ledger").glob("*.json"))[1]
  record.write_bytes(record.read_bytes().replace(b"1", b"2", 1))
  with pytest.raises(errors.LedgerError):
    _load(copy)


def test_settings_must_be_those_of_the_run(copy):
  config = _config()
  config.privacy.l2_clip_norm = 7.0
  with pytest.raises(ValueError, match="l2_clip_norm must be that of the run"):
    _load(copy, config=config)
  (copy / "config.json").unlink()
  with pytest.raises(ValueError, match="config must be given"):
    _load(copy)
  assert _load(copy, config=_config()).saved.step == 4


@pytest.mark.parametrize("use_ema", [False, True])
def test_exported_parameters_are_those_of_the_run(
  run, found, scores, tmp_path, use_ema
):
  _, result = run
  facts = export.write(found, scores, tmp_path / "m", name="m", use_ema=use_ema)
  assert (facts["params_sha256"] == result["params_sha256"]) != use_ema
  # As open as its siblings.
  assert len({path.stat().st_mode for path in (tmp_path / "m").iterdir()}) == 1
  model, params = export.load(tmp_path / "m")
  wanted = found.state.ema_params if use_ema else found.state.params
  jax.tree.map(np.testing.assert_array_equal, params, wanted)
  logits = model.apply({"params": params}, found.test["inputs"][0])
  np.testing.assert_array_equal(
    logits,
    found.task.predict(wanted, {"inputs": found.test["inputs"][0]}),
  )


def test_a_folder_that_is_not_empty_is_left_alone(found, scores, tmp_path):
  (tmp_path / "mine").write_text("mine")
  with pytest.raises(ValueError, match="new or empty directory"):
    export.write(found, scores, tmp_path, name="m")
  assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def _card(directory):
  _, front, body = (directory / "README.md").read_text().split("---\n", 2)
  return yaml.safe_load(front), body


def test_the_card_says_what_the_parameters_cost(run, found, scores, tmp_path):
  workdir, result = run
  export.write(found, scores, tmp_path / "m", name="my digits")
  front, body = _card(tmp_path / "m")
  assert "differential-privacy" in front["tags"]
  (told,) = front["model-index"]
  assert told["name"] == "my digits"
  scores = {m["type"]: m["value"] for m in told["results"][0]["metrics"]}
  assert scores == pytest.approx(result["test"])
  ledger = ledger_lib.Ledger(workdir / "ledger")
  for text in (
    "# my digits",
    "**epsilon = 2, delta = 0.0001**",
    composition.statement(ledger.planned),
    result["params_sha256"],
    result["environment"]["code_sha256"],
    "| noise multiplier |",
  ):
    assert text in body, text
  with open(tmp_path / "m" / "model.safetensors", "rb") as file:
    header = file.read(4096)
  assert b'"guarantee":"holds"' in header
  assert b'"epsilon"' in header


def test_nothing_exported_tells_of_the_data_or_the_secret(
  run, found, scores, tmp_path
):
  """A digest of the data would let examples be tried for."""
  export.write(found, scores, tmp_path / "m", name="m")
  secret = (run[0] / "secret").read_bytes()
  assert len(secret) == 32
  digest = found.ledger.segment.data.encode()
  for path in (tmp_path / "m").iterdir():
    for kept in (digest, secret, secret.hex().encode(), bytes(run[0])):
      assert kept not in path.read_bytes()


def test_a_void_guarantee_quotes_no_epsilon(copy, found, scores, tmp_path):
  with ledger_lib.Ledger(copy / "ledger") as ledger:
    ledger.acquire()
    ledger.notice("insecure_seed fixes every random stream")
  ledger = ledger_lib.Ledger(copy / "ledger")
  void = scores | {"guarantee": ledger.guarantee}
  export.write(found._replace(ledger=ledger), void, tmp_path / "m", name="m")
  front, body = _card(tmp_path / "m")
  assert "differential-privacy" not in front["tags"]
  assert "**No privacy guarantee.** Insecure_seed fixes" in body
  assert "epsilon" not in body
  with open(tmp_path / "m" / "model.safetensors", "rb") as file:
    header = file.read(4096)
  assert b"void: insecure_seed" in header
  assert b'"epsilon"' not in header
  assert safetensors.load_file(tmp_path / "m" / "model.safetensors")

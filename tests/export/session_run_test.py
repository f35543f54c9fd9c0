"""What a loop of one's own saved, told of and exported by the commands."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import dpdist
from dpdist import errors
from dpdist.export import export
from dpdist.export import session_run
from dpdist.ledger import ledger as ledger_lib
from dpdist.workdir import manifest
from tests.support import commands

pytestmark = pytest.mark.usefixtures("quick_compiles")

_ROWS = 32


def _loss(params, example, key, given=None):
  del key, given
  return (example["x"] @ params["w"] - params["b"]) ** 2


def _start():
  params = {"b": jnp.zeros(()), "w": jnp.arange(2.0)}
  return {"params": params, "momentum": (jnp.ones(2), jnp.int32(3))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The directory of a run of two losses, and its last state."""
  workdir = tmp_path_factory.mktemp("run")
  config = dpdist.PrivacyConfig(
    **{"num_examples": _ROWS, "expected_batch_size": 8.0, "num_steps": 8},
    **{"l2_clip_norm": 1.0, "target_delta": 1e-3, "noise_multiplier": 1.0},
    accountant="rdp",
  )
  x = np.random.default_rng(0).normal(size=(_ROWS, 2)).astype(np.float32)
  with dpdist.Session(
    workdir,
    config,
    # One of them is charged and not used.
    loss={"one": _loss, "other": _loss},
    dataset={"x": x},
    **{"checkpoint_every": 2, "sentinel_every": 0},
  ) as session:
    state = session.restore(_start())
    for step in session:
      gradients = step.gradients(state["params"], "one")
      params = jax.tree.map(jnp.subtract, state["params"], gradients)
      state = state | {"params": params}
      session.log(accuracy=0.5 + step.number / 8)
      session.save(state)
  return workdir, state


def _load(workdir, **changes):
  ledger = ledger_lib.Ledger(workdir / "ledger")
  return session_run.load(workdir, ledger, **changes)


def test_the_command_tells_what_the_loop_logged(run):
  workdir, _ = run
  result = json.loads((workdir / "result.json").read_text())
  for args, accuracy in ((), 0.875), (["--step=2"], 0.625):
    done = commands.run("eval", f"--workdir={workdir}", "--json", *args)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["test"] == {"accuracy": accuracy}
    assert facts["epsilon"] == result["epsilon"]
    assert facts["guarantee"] == "holds"
  done = commands.run("eval", f"--workdir={workdir}")
  assert "as the loop logged them" in done.out


def test_a_state_is_exported_by_its_paths_with_its_privacy(run, tmp_path):
  workdir, state = run
  output = tmp_path / "model"
  done = commands.run("export", f"--workdir={workdir}", f"--output={output}")
  assert done.code == 0, done.err
  _, loaded = export.load(output, template=_start())
  jax.tree.map(np.testing.assert_array_equal, loaded, state)
  _, front, body = (output / "README.md").read_text().split("---\n", 2)
  assert "differential-privacy" in yaml.safe_load(front)["tags"]
  for text in ("**epsilon = ", "| noise multiplier |", "accuracy | 0.8750"):
    assert text in body, text
  # A digest of the data would let examples be tried for.
  secret = (workdir / "secret").read_bytes()
  data = ledger_lib.Ledger(workdir / "ledger").segment.data
  for path in output.iterdir():
    for kept in (secret, secret.hex().encode(), data.encode()):
      assert kept not in path.read_bytes()


def test_a_part_of_a_state_is_loaded_into_the_parameters(run, tmp_path):
  workdir, state = run
  saved = _load(workdir, step=4)
  facts = session_run.evaluate(saved)
  session_run.write(saved, facts, tmp_path / "m", name="m", part="params")
  _, loaded = export.load(tmp_path / "m", template=_start()["params"])
  jax.tree.map(np.testing.assert_array_equal, loaded, state["params"])
  with pytest.raises(ValueError, match="part must be the beginning of the"):
    session_run.write(saved, facts, tmp_path / "n", name="m", part="param")
  assert not (tmp_path / "n").exists()


def test_what_the_run_has_not_is_refused(run, tmp_path):
  workdir, _ = run
  with pytest.raises(ValueError, match=r"one of \[2, 4\], got 8"):
    _load(workdir, step=8)
  output = f"--output={tmp_path / 'm'}"
  done = commands.run("export", f"--workdir={workdir}", output, "--ema")
  assert done.code == 2
  assert "ema must be left out for the run of a loop" in done.err


def test_an_unsound_record_is_not_exported(run, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(run[0], copy)
  path = copy / "result.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"delta": 1e-9}))
  with pytest.raises(errors.UnsoundError, match="is not sound"):
    _load(copy)


def test_a_checkpoint_without_names_says_what_to_do(run, monkeypatch):
  monkeypatch.setattr(manifest, "meta", lambda path: {"ledger_head": ""})
  monkeypatch.setattr(session_run.load_run, "check_sound", lambda *args: None)
  with pytest.raises(ValueError, match="an earlier release of dpdist"):
    _load(run[0])

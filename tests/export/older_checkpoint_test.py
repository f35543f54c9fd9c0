"""What is told of a checkpoint counts all that its run was charged by now.

Whoever sees an older checkpoint may have seen what came after it. Nothing is
trained or compiled here.
"""

import json
import re
import types

import numpy as np
import pytest

import dpdist
from dpdist import config as config_lib
from dpdist.distributed import mesh as mesh_lib
from dpdist.export import export
from dpdist.export import load_run
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib


def _plan(**changes):
  given = {
    "num_examples": 1000,
    "expected_batch_size": 100,
    "num_steps": 100,
    "l2_clip_norm": 1.0,
    "target_delta": 1e-5,
    "noise_multiplier": 2.0,
    "accountant": "rdp",
  }
  return plan_lib.make_plan(plan_lib.PrivacyConfig(**{**given, **changes}))


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A checkpoint of step 10, of a run that was charged more since.

  On the same branch, on another one, and under another plan.
  """
  with ledger_lib.Ledger(tmp_path / "ledger") as ledger:
    ledger.acquire()
    ledger.open(
      config={}, plan=_plan(), data="d" * 64, secret_hash="5" * 64, run="a run"
    )
    resume = lambda fingerprint: ledger.resume(
      step=10 * bool(ledger.branches),
      digest="ten" * bool(ledger.branches),
      ledger_head="",
      fingerprint=fingerprint,
    )
    resume("f")
    ledger.reserve_through(10)
    ledger.record_checkpoint(10, "ten")
    ledger.reserve_through(20)
    resume("g")
    ledger.reserve_through(30)
    ledger.open_segment(
      config={}, plan=_plan(noise_multiplier=1.0), data="d" * 64, start_step=10
    )
    resume("h")
    ledger.reserve_through(40)
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  (saved,) = ledger.checkpoints
  metrics = {"accuracy": (0.5, 1), "loss": (0.7, 1)}
  task = dpdist.Task(
    init=lambda key, example: {"w": 0.0},
    loss=lambda params, example, rng: (0.0, None),
    metrics=lambda params, example: metrics,
  )
  state = types.SimpleNamespace(
    params={"w": np.ones(3, np.float32)}, ema_params=None
  )
  test = {
    "inputs": np.zeros((4, 2), np.float32),
    "targets": np.zeros(4, np.int32),
  }
  mesh = mesh_lib.make({"data": -1, "fsdp": 1, "model": 1})
  return load_run.Released(
    config_lib.default(), ledger, saved, task, mesh, state, test, {}
  )


def test_an_older_checkpoint_costs_what_the_whole_run_did(run, tmp_path):
  spent = composition.epsilon(run.ledger.spent)
  # It was less when the checkpoint was saved.
  assert spent > 2 * _plan().curve([1e-5], 10)[0]
  facts = load_run.evaluate(run)
  assert facts["step"] == 10
  assert facts["epsilon"] >= spent
  written = export.write(run, facts, tmp_path / "model", name="old")
  assert written["epsilon"] >= spent
  card = (tmp_path / "model" / "README.md").read_text()
  (told,) = re.findall(r"\*\*epsilon = ([0-9.]+)", card)
  assert float(told) >= spent
  assert "70" in card  # Steps that are charged, on all branches.
  data = (tmp_path / "model" / "model.safetensors").read_bytes()
  size = int.from_bytes(data[:8], "little")
  kept = json.loads(data[8 : 8 + size])["__metadata__"]
  assert float(kept["epsilon"]) >= spent


def test_where_weights_were_read_from_is_not_exported(run, tmp_path):
  run.config.model.weights = "/home/hunter2/weights"
  export.write(run, load_run.evaluate(run), tmp_path / "model", name="mine")
  for path in (tmp_path / "model").iterdir():
    assert b"hunter2" not in path.read_bytes(), path

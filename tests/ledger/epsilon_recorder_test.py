"""The odometer: what it records, and that it holds nothing up."""

import dataclasses
import threading

import pytest

from dpdist.ledger import epsilon_recorder
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import composition
from dpdist.privacy import plan as plan_lib

_CONFIG = plan_lib.PrivacyConfig(
  num_examples=1000,
  expected_batch_size=10,
  num_steps=100,
  l2_clip_norm=1.0,
  target_delta=1e-5,
  noise_multiplier=2.0,
)


@pytest.fixture
def ledger(tmp_path):
  with ledger_lib.Ledger(tmp_path) as ledger:
    ledger.acquire()
    ledger.open(
      config=dataclasses.asdict(_CONFIG),
      plan=plan_lib.make_plan(_CONFIG),
      data="",
      secret_hash="",
      run="a run",
    )
    ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
    yield ledger


def _right(ledger):
  return {
    "spent": composition.epsilons(ledger.spent),
    "planned": composition.epsilons(ledger.planned),
  }


def test_it_records_what_is_charged_and_once(ledger):
  with epsilon_recorder.EpsilonRecorder(ledger) as odometer:
    for stop in (1, 2):
      ledger.reserve_through(stop)
      assert ledger.epsilons is None
      odometer.poll(wait=True)
      assert ledger.epsilons == _right(ledger)
    head = ledger.head
    odometer.poll()
    odometer.poll(wait=True)
    assert ledger.head == head


def test_it_holds_nothing_up_and_what_is_outdated_is_dropped(
  ledger, monkeypatch
):
  go_on, epsilons = threading.Event(), composition.epsilons

  def slow(parts):
    go_on.wait()
    return epsilons(parts)

  with monkeypatch.context() as patch:
    patch.setattr(composition, "epsilons", slow)
    with epsilon_recorder.EpsilonRecorder(ledger) as odometer:
      ledger.reserve_through(1)
      odometer.poll()
      ledger.reserve_through(2)
      odometer.poll()
      assert ledger.epsilons is None
      go_on.set()
      odometer.poll(wait=True)
  assert ledger.epsilons == _right(ledger)
  kinds = [record["kind"] for record in ledger.records]
  assert kinds.count("epsilons") == 1

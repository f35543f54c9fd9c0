"""Signals become a flag once, and what was there before comes back."""

import os
import signal
import threading

import pytest

from dpdist.distributed import preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_sets_the_flag_and_a_later_one_acts(monkeypatch, number):
  seen = []
  previous = signal.signal(number, lambda *_: seen.append("before"))
  try:
    with preemption.Notice() as notice:
      assert not notice.received
      os.kill(os.getpid(), number)
      assert notice.received
      assert notice.reason == number.name
      # What several senders pass on is one request.
      os.kill(os.getpid(), number)
      assert seen == []
      now = preemption.time.monotonic()
      monkeypatch.setattr(preemption.time, "monotonic", lambda: now + 2)
      os.kill(os.getpid(), number)
      assert seen == ["before"]
      os.kill(os.getpid(), number)
      assert seen == ["before"] * 2
    os.kill(os.getpid(), number)
    assert seen == ["before"] * 3
  finally:
    signal.signal(number, previous)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_early_warnings_count_under_slurm_alone(monkeypatch, number):
  seen = []
  previous = signal.signal(number, lambda *_: seen.append("before"))
  try:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with preemption.Notice() as notice:
      os.kill(os.getpid(), number)
      assert not notice.received
    assert seen == ["before"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with preemption.Notice() as notice:
      os.kill(os.getpid(), number)
      assert notice.received
    assert seen == ["before"]
  finally:
    signal.signal(number, previous)


def test_other_threads_are_left_alone():
  before = signal.getsignal(signal.SIGTERM)
  inside = []

  def work():
    with preemption.Notice() as notice:
      inside.append((signal.getsignal(signal.SIGTERM), notice.received))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert inside == [(before, False)]

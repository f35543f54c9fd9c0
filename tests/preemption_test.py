"""Signals become a flag once, and what was there before comes back."""

import os
import signal
import threading

import pytest

from dpdist import preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_sets_the_flag_and_second_acts(number):
  seen = []
  previous = signal.signal(number, lambda *_: seen.append("before"))
  try:
    with preemption.Notice() as notice:
      assert not notice.received
      os.kill(os.getpid(), number)
      assert notice.received
      assert seen == []
      os.kill(os.getpid(), number)
      assert seen == ["before"]
    os.kill(os.getpid(), number)
    assert seen == ["before"] * 2
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

"""Turns any request to stop this process into a flag."""

import contextlib
from typing import Self

from dpdist.distributed import gce_maintenance
from dpdist.distributed import signals


class Notice:
  """Turns the first request to stop into a flag; a context manager.

  Requests are signals (see `dpdist.distributed.signals`) and, on Google's
  machines, the notice that the machine will be stopped (see
  `dpdist.distributed.gce_maintenance`).

  Attributes:
    received: whether a request came.
    reason: what the request was; "" until then.
  """

  def __init__(self) -> None:
    self.received = False
    self.reason = ""
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> Self:
    self._stack.enter_context(signals.Signals(self._receive))
    self._stack.enter_context(gce_maintenance.Maintenance(self._receive))
    return self

  def __exit__(self, *unused: object) -> None:
    self._stack.close()

  def _receive(self, reason: str) -> None:
    self.reason = self.reason or reason
    self.received = True

"""The settings of a job that every engine needs."""

import dataclasses
import re
from typing import Any

# A DNS label, and short enough for what engines append to it.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
# Words for files in which nothing can be quoted.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@+-]*")


class JobError(ValueError):
  """A value that cannot be put into a job file; names it."""


@dataclasses.dataclass(frozen=True)
class Job:
  """A job; each engine adds attributes of its own.

  Attributes:
    name: of the job, a DNS label of at most 40 characters.
    workdir: the run's directory, absolute, the same for all processes.
    arguments: of launch.train: its settings, without the run directory.
    nodes: how many machines.
    max_restarts: how many restarts after failures; a stop that saved is not
      counted.

  Raises:
    JobError: a value cannot be used.
  """

  name: str
  workdir: str
  arguments: tuple[str, ...]
  nodes: int = 1
  max_restarts: int = 20

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not text.isprintable():
          raise JobError(
            f"{field.name} must have no line breaks or control characters, got"
            f" {text!r}"
          )
    if not _NAME.fullmatch(self.name):
      raise JobError(
        "name must be lower-case letters, digits and -, begin with a letter,"
        f" and have at most 40 characters, got {self.name!r}"
      )
    if not self.workdir.startswith("/"):
      raise JobError(
        "workdir must be an absolute path on a file system that all machines"
        f" see, got {self.workdir!r}"
      )
    self.check_at_least(1, "nodes")
    self.check_at_least(0, "max_restarts")

  def check_at_least(self, least: int, *names: str) -> None:
    """Raises JobError if a number is lower."""
    for name in names:
      if getattr(self, name) < least:
        raise JobError(
          f"{name} must be at least {least}, got {getattr(self, name)}"
        )

  def check_words(self, *names: str) -> None:
    """Raises JobError if a given text is more than a plain word."""
    for name in names:
      value: Any = getattr(self, name)
      if value and not _WORD.fullmatch(value):
        raise JobError(
          f"{name} must be letters, digits and any of _.:/@+-, got {value!r}"
        )

  def train(self, python: str, secret_file: str = "") -> list[str]:
    """Returns the command of one process.

    Args:
      python: the interpreter.
      secret_file: where the engine puts the run's secret; "": as configured.
    """
    command = [python, "-u", "-m", "launch.train", *self.arguments]
    if secret_file:
      command.append(f"--config.secret_file={secret_file}")
    return [*command, f"--workdir={self.workdir}"]

"""The interface of an engine, and the settings that every job needs.

An engine writes the files of a job and the command that submits them. It is a
module, or any object, with the attributes of `Engine`. `dpdist.registry` finds
it by the name in `--to=NAME` of `launch.submit`. So an installed package can
add an engine by an entry point of the group "dpdist.engine".
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any, Protocol

from dpdist import _validation
from dpdist import errors

from ..cli import words

# A DNS label, and short enough for what engines append to it.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
# Words for files in which nothing can be quoted.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@+-]*")

WORD = _validation.Rule(
  "letters, digits and any of _.:/@+-",
  str,
  str,
  lambda text: not text or bool(_WORD.fullmatch(text)),
)
_LABEL = _validation.Rule(
  "lower-case letters, digits and -, begin with a letter, and have at most 40"
  " characters",
  str,
  str,
  lambda text: bool(_NAME.fullmatch(text)),
)
_ABSOLUTE = _validation.Rule(
  "an absolute path on a file system that all machines see",
  str,
  str,
  lambda text: text.startswith("/"),
)


def flag(default: Any, help: str, rule: _validation.Rule | None = None) -> Any:
  """Returns a field of a `Job` that is also a flag of `launch.submit`.

  Its type is that of the default; MISSING: it is a text, and must be given.
  """
  return dataclasses.field(
    default=default, metadata={"help": help, "rule": rule}
  )


def word(default: str, help: str) -> Any:
  """Returns a `flag` for a text that needs no quotes anywhere."""
  return flag(default, help, WORD)


def count(default: int, help: str, *, at_least: int = 1) -> Any:
  """Returns a `flag` for a number of things."""
  return flag(default, help, _validation.integer(at_least))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A job. Each engine adds fields, made by `flag`, `word` or `count`.

  Raises:
    errors.ArgumentError: a value cannot be put into the job's files.
  """

  # The flags of launch.train, without the run directory.
  arguments: tuple[str, ...]
  name: str = flag("dpdist", "The name of the job.", _LABEL)
  workdir: str = flag(
    dataclasses.MISSING,
    "The directory of the run, absolute, which all machines see.",
    _ABSOLUTE,
  )
  nodes: int = count(1, "The number of machines.")
  max_restarts: int = count(
    20,
    "How often the job restarts after failures; a stop that saved is not"
    " counted.",
    at_least=0,
  )

  def __post_init__(self) -> None:
    fields = dataclasses.fields(self)
    for field in fields:
      value = getattr(self, field.name)
      for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not text.isprintable():
          raise errors.ArgumentError(
            f"{field.name} must have no line breaks or control characters, got"
            f" {text!r}"
          )
    rules = {field.name: field.metadata.get("rule") for field in fields}
    _validation.check_fields(
      self, {name: rule for name, rule in rules.items() if rule is not None}
    )

  def train(self, python: str, secret_file: str = "") -> list[str]:
    """Returns the command of one process, which the Python at `python` runs.

    The engine puts the run's secret into `secret_file`; "" leaves it where the
    config says.
    """
    command = [python, "-u", "-m", words.module("train"), *self.arguments]
    if secret_file:
      command.append(f"--config.secret_file={secret_file}")
    return [*command, f"--workdir={self.workdir}"]


class Engine(Protocol):
  """The attributes that an engine must have."""

  # The program that submits, and what to install where it is missing.
  TOOL: tuple[str, str]

  @property
  def Job(self) -> type[Any]:  # noqa: N802 - a class
    """Returns the class of its jobs, a frozen dataclass derived from `Job`."""

  def files(self, job: Any) -> Mapping[str, str]:
    """Returns the texts of the job's files, by their names."""

  def command(self, job: Any, folder: str) -> list[str]:
    """Returns the command that submits the files in a folder."""

"""Sets settings by flags, --config.SECTION.NAME=VALUE, and lists all of them.

A flag may come before or after --config; of several for a setting the last one
counts.
"""

import ast
from collections.abc import Sequence
import re
import textwrap
from typing import Any, NamedTuple

from absl import flags
import ml_collections

from dpdist import _settings
from dpdist import config as config_lib
from dpdist import errors

_WIDTH = 80
_NONE = ("", "None", "none")


class Change(NamedTuple):
  """A setting as the command line gives it.

  Attributes:
    path: the setting, as "privacy.num_steps".
    text: its value; None: the flag stands alone, as those of booleans may.
  """

  path: str
  text: str | None


def take(argv: Sequence[str]) -> tuple[list[str], list[Change]]:
  """Returns the arguments that set no setting, and those that do."""
  kept: list[str] = []
  changes: list[Change] = []
  words = list(argv)
  while words:
    word = words.pop(0)
    if word == "--":
      return [*kept, word, *words], changes
    match = re.fullmatch(r"--?(no)?config\.([\w.]+)(?:=(.*))?", word, re.DOTALL)
    if match is None:
      kept.append(word)
      continue
    no, path, text = match.groups()
    if no:
      text = "False"
    elif text is None and not isinstance(_default(path), bool) and words:
      text = words.pop(0)
    changes.append(Change(path, text))
  return kept, changes


def change(
  config: ml_collections.ConfigDict, changes: Sequence[Change]
) -> dict[str, Any]:
  """Changes a config, and returns the new values by path.

  Raises:
    ValueError: names the setting, its value and what would be right.
  """
  made: dict[str, Any] = {}
  for path, text in changes:
    *above, name = path.split(".")
    section: Any = config
    for i, part in enumerate(above):
      if not _is_section(section.get(part)):
        raise _unknown(config, ".".join(above[: i + 1]), path)
      section = section[part]
    is_new = name not in section
    is_option = config_lib.is_free(".".join(above)) and above != ["user"]
    if is_new and not is_option:
      raise _unknown(config, path, path)
    value = _parsed(path, section, name, text)
    with section.unlocked():
      section[name] = value
    made.pop(path, None)
    made[path] = value
  return made


def _unknown(
  config: ml_collections.ConfigDict, wrong: str, path: str
) -> errors.ArgumentError:
  """Returns the error for a part of a path that there is not."""
  if path.startswith("user."):
    own = ", ".join(f"config.user.{name}" for name in config.user)
    return errors.ArgumentError(
      f"there is no setting config.{path}: the file of --config defines those"
      f" of config.user, which are {own or 'none'}"
    )
  is_below_a_setting = isinstance(_settings.TABLE.get(wrong), tuple)
  return config_lib.unknown(path if is_below_a_setting else wrong)


def _is_section(value: Any) -> bool:
  return isinstance(value, ml_collections.ConfigDict)


def _default(path: str) -> Any:
  given = _settings.TABLE.get(path)
  return given[0] if isinstance(given, tuple) else None


def _parsed(
  path: str, section: ml_collections.ConfigDict, name: str, text: str | None
) -> Any:
  """Returns a value of the setting's type."""
  kind: Any = section.get_type(name) if name in section else object
  if _is_section(section.get(name)):
    raise errors.ArgumentError(
      f"config.{path} is a section: set what is in it, as"
      f" --config.{path}.NAME=VALUE, got {text!r}"
    )
  optional = path in config_lib.optional() or section.get(name, "") is None
  if text is None:
    text = "True" if kind in (bool, object) else ""
  if optional and text in _NONE:
    return None
  try:
    return _PARSERS.get(kind, _literal)(text)
  except ValueError as error:
    words = _WORDS.get(kind, f"a {kind.__name__}")
    if optional:
      words = f"None or {words}"
    raise errors.ArgumentError(
      f"config.{path} must be {words}, got {text!r}"
    ) from error


def _integer(text: str) -> int:
  """Reads a whole number; 1e3 is one, 1.5 is none."""
  try:
    return int(text, 0)
  except ValueError:
    number = float(text)
  if not number.is_integer():
    raise ValueError(text)
  return int(number)


def _tuple(text: str) -> tuple[Any, ...]:
  value = _literal(text if text.strip() else "()")
  if not isinstance(value, list | tuple):
    raise ValueError(text)
  return tuple(value)


def _literal(text: str) -> Any:
  """Reads a value of Python; what is none is a text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


_PARSERS: dict[Any, Any] = {
  bool: lambda text: flags.BooleanParser().parse(text),
  int: _integer,
  float: float,
  str: str,
  tuple: _tuple,
  list: lambda text: [*_tuple(text)],
}
_WORDS = {
  bool: "True or False",
  int: "an integer",
  float: "a number",
  tuple: "a tuple, as '((0, 1.0), (100, 2.0))'",
  list: "a list, as '[1, 2]'",
}


def reference() -> str:
  """Returns all settings as text of 80 columns."""
  lines = [f"Settings, as --config.NAME=VALUE. {_FIRST}"]
  for setting in _settings.settings():
    if not setting.type:
      wrapped = textwrap.fill(f"{setting.path}: {setting.meaning}", _WIDTH)
      lines.append("\n" + wrapped)
      continue
    lines.append(f"  {setting.path}  ({setting.type}, {setting.default})")
    indent = " " * 6
    lines.append(
      textwrap.fill(
        setting.meaning,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
      )
    )
  return "\n".join(lines) + "\n"


def page() -> str:
  """Returns docs/settings.md."""
  lines = [_PAGE]
  for setting in _settings.settings():
    meaning = setting.meaning.replace("|", "\\|")
    if not setting.type:
      lines += ["", f"## {setting.path}", "", meaning, "", *_COLUMNS]
    else:
      lines.append(
        f"| `{setting.path}` | {setting.type} | `{setting.default}` |"
        f" {meaning} |"
      )
  return "\n".join(lines) + "\n"


_FIRST = "Those of no section come first."
_COLUMNS = (
  "| setting | type | default | meaning |",
  "| --- | --- | --- | --- |",
)
_PAGE = f"""# Settings

All settings of a config, as `dpdist.config.default()` makes them. A config file
changes them by name, and a flag as `--config.NAME=VALUE`: see
[commands](cli.md#settings). Every command prints this list with `--settings`.
This page is written by
`python -c "from launch.cli import settings; print(settings.page(), end='')"`.

{_FIRST}

{_COLUMNS[0]}
{_COLUMNS[1]}"""

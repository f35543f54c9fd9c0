"""Tells this project's own code from that of its users, by where it is.

A wheel brings launch/ and configs/ inside of dpdist/, while a checkout has them
beside it. A package "launch" beside an installed dpdist is somebody else's.
Configs are settings, and count as code from outside.
"""

import pathlib

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def files(root: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
  """Returns the names and paths of our code's files below a folder, sorted.

  The names are those of a checkout, so that the same code has the same names
  where it is installed.
  """
  return sorted(
    (f"{name}/{path.relative_to(folder).as_posix()}", path)
    for name, folder in _folders(root).items()
    for path in folder.rglob("*.py")
    if name == "launch" or not _is_brought_along(path, root)
  )


def has(path: pathlib.Path) -> bool:
  """Returns whether a file, by its resolved path, is of our code."""
  package, launch = _folders(_ROOT).values()
  return path.is_relative_to(launch) or (
    path.is_relative_to(package) and not _is_brought_along(path, _ROOT)
  )


def _folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
  package = root / "dpdist"
  is_installed = (package / "launch" / "__init__.py").is_file()
  launch = package / "launch" if is_installed else root / "launch"
  return {"dpdist": package, "launch": launch}


def _is_brought_along(path: pathlib.Path, root: pathlib.Path) -> bool:
  """Returns whether a wheel has a path inside of dpdist, a checkout beside."""
  folders = (root / "dpdist" / name for name in ("launch", "configs"))
  return any(path.is_relative_to(folder) for folder in folders)

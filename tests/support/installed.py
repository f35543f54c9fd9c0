"""Builds the wheel of this tree, and installs it in an environment of its own.

What it needs is found in the environment of these tests, so that nothing is
downloaded; dpdist itself is not, nor is the checkout.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("dpdist", "launch", "configs")
_HIDDEN = ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV")


def variables() -> dict[str, str]:
  """Returns this process' variables without those that lead to the checkout."""
  return {k: x for k, x in os.environ.items() if k not in _HIDDEN}


def run(*words: object, cwd: pathlib.Path, code: int = 0) -> str:
  """Runs a program to its end, which must be `code`; returns what it says."""
  done = subprocess.run(
    [str(word) for word in words],
    cwd=cwd,
    env=variables(),
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout + done.stderr


def copy(to: pathlib.Path) -> pathlib.Path:
  """Copies what the wheel is made of into a new folder."""
  unwanted = shutil.ignore_patterns("__pycache__")
  for name in FOLDERS:
    shutil.copytree(ROOT / name, to / name, ignore=unwanted)
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, to / name)
  return to


def build(tree: pathlib.Path, to: pathlib.Path, *options: str) -> pathlib.Path:
  """Builds the wheel of a tree, and what else `options` say."""
  run(
    *(sys.executable, "-m", "build", "--no-isolation", tree, *options),
    f"--outdir={to}",
    cwd=tree,
  )
  (wheel,) = to.glob("*.whl")
  return wheel


def install(folder: pathlib.Path, wheel: pathlib.Path) -> pathlib.Path:
  """Makes an environment in which pip has installed a wheel.

  Returns:
    Where its programs are.
  """
  venv.create(folder, symlinks=True)
  python = folder / "bin" / "python"
  run(
    *(sys.executable, "-m", "pip", "--python", python, "install", "--no-index"),
    *("--no-deps", "--quiet", wheel),
    cwd=folder,
  )
  (packages,) = folder.glob("lib/python*/site-packages")
  # After dpdist's own place, so that no other dpdist is found first. Files
  # there that make paths known, as of an editable install, are not read.
  paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
  (packages / "zz_others.pth").write_text("\n".join(paths))
  return folder / "bin"

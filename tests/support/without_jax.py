"""Runs Python where jax, or more, cannot be imported."""

import subprocess
import sys

# A finder, and not None in sys.modules: scipy asks there whether jax is loaded.
_BLOCK = """
import sys
class _NoJax:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in WITHOUT:
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, _NoJax())
"""


def run(
  code: str, *args: str, without: tuple[str, ...] = ("jax", "jaxlib")
) -> subprocess.CompletedProcess[str]:
  """Runs code with args as sys.argv[1:]; the result is not checked."""
  return subprocess.run(
    [
      sys.executable,
      "-c",
      _BLOCK.replace("WITHOUT", repr(without)) + code,
      *args,
    ],
    capture_output=True,
    text=True,
    timeout=300,
  )

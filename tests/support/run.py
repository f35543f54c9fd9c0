"""Runs a test file under Bazel, which needs a main: the file is the argument.

A test's own folder is read-only there, and one process is enough for one file.
It runs what `python -m pytest` runs, whose settings Bazel does not see: no jobs
of many processes, nothing that takes long or wants libtpu. Of a file that has
nothing else, nothing is run.
"""

import sys

import pytest

_ORDINARY = "not cluster and not slow and not tpu"

if __name__ == "__main__":
  code = pytest.main(
    ["-n0", "-p", "no:cacheprovider", "-m", _ORDINARY, *sys.argv[1:]]
  )
  sys.exit(0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code)

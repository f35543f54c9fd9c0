"""Runs a test file under Bazel, which needs a main: the file is the argument.

A test's own folder is read-only there, and one process is enough for one file.
"""

import sys

import pytest

if __name__ == "__main__":
  sys.exit(pytest.main(["-n0", "-p", "no:cacheprovider", *sys.argv[1:]]))

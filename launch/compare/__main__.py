"""Puts runs side by side on one page: accuracy against epsilon.

See `launch.compare.command`.
"""

import sys

from . import command

sys.exit(command.main())

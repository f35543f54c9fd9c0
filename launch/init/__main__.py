"""Writes a project of your own, which trains as it is.

See `launch.init.project`.
"""

import sys

from . import project

sys.exit(project.main())

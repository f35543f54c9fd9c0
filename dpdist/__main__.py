"""Runs `python -m dpdist NAME`, which is `dpdist NAME`."""

import importlib
import importlib.util
import sys

# The modules of launch/ are dpdist.launch where dpdist is installed.
_PLACE = "dpdist." if importlib.util.find_spec("dpdist.launch") else ""
sys.exit(importlib.import_module(f"{_PLACE}launch.cli.words").main())

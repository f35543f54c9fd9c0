"""Puts launch/ and configs/ into the wheel as dpdist.launch and dpdist.configs.

No other package of those names is then in the way of an installed dpdist. All
else is in pyproject.toml.
"""

import setuptools

_INSIDE = ("launch", "configs")

setuptools.setup(
  packages=[
    *setuptools.find_packages(include=["dpdist", "dpdist.*"]),
    *(
      f"dpdist.{name}"
      for top in _INSIDE
      for name in setuptools.find_packages(include=[top, f"{top}.*"])
    ),
  ],
  package_dir={f"dpdist.{name}": name for name in _INSIDE},
)

"""Named data sets, one module for each."""

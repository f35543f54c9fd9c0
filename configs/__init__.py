"""The settings of experiments, one file for each."""

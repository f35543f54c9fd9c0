"""Data sets, read by index into the padded chunks of a step."""

"""The training step, the run around it, and the checks before it."""

"""The training step, the run around it, and what is checked before."""

"""Compares the clipped sum with `jax.grad`, before a run and during it."""

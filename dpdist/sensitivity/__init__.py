"""Holds the clipped sum against `jax.grad`, before and while a run goes."""

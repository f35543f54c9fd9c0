"""Binds a plan to its sampler, clipped sum and noise."""

"""Where a plan meets sampler, clipped sum and noise."""

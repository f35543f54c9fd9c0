"""The ways to a clipped sum, and from norms to scales."""

"""The engines that compute clipped sums, and the scaling by norms."""

"""Measures the costs of the private step here, or forecasts them for TPUs."""

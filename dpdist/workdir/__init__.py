"""A run's directory: how it is resumed, saved, and verified."""

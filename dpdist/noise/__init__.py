"""Noise mechanisms."""

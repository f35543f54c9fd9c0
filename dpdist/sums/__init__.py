"""Sums of float arrays that lose nothing: compensated or in integers."""

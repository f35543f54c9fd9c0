"""Sums of float arrays that lose nothing: compensated ones, and integers."""

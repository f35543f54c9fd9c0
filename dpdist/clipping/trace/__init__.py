"""Traces the loss of one example, and finds where parameters meet data."""

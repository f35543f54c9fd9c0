"""Fetches, pins and reads files that others publish."""

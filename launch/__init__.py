"""Doors: flags in, exit codes out."""

"""Attacks the step that runs, and derives lower bounds on epsilon."""

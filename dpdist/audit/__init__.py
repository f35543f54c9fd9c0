"""Attacks on the step that runs, and lower bounds on epsilon from them."""

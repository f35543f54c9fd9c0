"""Losses and metrics as formulas of one example's outputs and targets."""

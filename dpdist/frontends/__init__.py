"""Adapters for the frameworks of models, one module for each.

The core imports none of the frameworks. Each module here is imported by its own
name, and only then its framework: `from dpdist.frontends import keras`.

Models that are plain functions need no adapter: `dpdist.clipped_grad` and
`dpdist.private_gradients` take any loss_fn(params, example[, rng]).
"""

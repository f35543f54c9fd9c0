"""Glue for the frameworks that models are written in, one module for each.

The core knows none of them. Each module here is imported by its own name, and
only then its framework: `from dpdist.frontends import keras`.

Models that are plain functions need no glue: `dpdist.clipped_grad` and
`dpdist.private_gradients` take any loss_fn(params, example[, rng]).
"""

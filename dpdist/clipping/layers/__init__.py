"""Per-example norms and gradients of each kind of layer, and their costs."""

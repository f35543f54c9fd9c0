"""Training tasks: losses, held-out metrics, optimizers."""

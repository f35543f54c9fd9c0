"""What is trained: losses, held-out metrics, optimizers."""

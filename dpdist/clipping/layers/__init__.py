"""What each kind of layer contributes: norms, gradients, costs."""

"""What the private step costs, measured here or compiled for TPUs."""

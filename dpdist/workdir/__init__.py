"""The run directory: resuming, saving and verifying a run."""

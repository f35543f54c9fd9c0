"""A private training loop of one's own, with the whole record of a run."""

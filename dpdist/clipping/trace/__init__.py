"""A loss of one example, traced and taken apart."""

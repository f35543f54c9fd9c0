"""Short programs to copy, one for each framework: a private training loop.

Each trains on the digits that come with scikit-learn and prints its accuracy
and what it has spent.
"""

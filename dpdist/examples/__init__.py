"""Short programs to copy: one private training loop, and a loss per framework.

Each trains on the digits that come with scikit-learn and prints its accuracy
and what it has spent. `loop` is the loop of all but Keras, whose `fit` is one.
"""

"""What tasks and frontends know of the frameworks of models.

The core imports none of the frameworks but Flax Linen. A module here is
imported only for a model that is one of its framework.
"""

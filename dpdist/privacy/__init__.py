"""The plan that a run is bound to, its composition and its statement."""

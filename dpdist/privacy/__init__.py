"""The plan that a run is bound to, what it composes to, and its words."""

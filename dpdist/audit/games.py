"""The games of an audit by name. Imports nothing: flags list them."""

MODES = ("worst_case", "one_run")
"""Whether canaries are tried apart, or all in one run."""

CANARIES = ("entry", "example")
"""What a canary's gradient is: one entry, or of the model itself."""

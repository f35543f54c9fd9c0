"""The commands: they parse flags, run, and return exit codes."""

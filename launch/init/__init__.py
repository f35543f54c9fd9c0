"""Writes projects: each other module but `samples` is the config of a kind."""

"""The command that puts runs on one page."""

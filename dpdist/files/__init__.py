"""JSON that is checked when it is read, and stamps of files."""

"""JSON that is checked when it is read, atomic writes, and stamps of files."""

"""Files that others publish: fetched, pinned and read."""

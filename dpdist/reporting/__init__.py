"""What a run shows to a person, or may release: metrics, pages, screens."""

"""What a run shows or releases: metrics, reports, console output."""

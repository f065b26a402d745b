"""Shows what Loupe does: `python -m demo`."""

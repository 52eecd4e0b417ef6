"""What a run leaves on disk, and what it takes to continue it."""

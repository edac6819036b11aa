"""What it takes to undo a write in place, or to finish it."""

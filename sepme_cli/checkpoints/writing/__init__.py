"""Writing checkpoints: to a file, a folder, a stream, or in place."""

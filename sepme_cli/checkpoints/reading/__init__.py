"""Opening checkpoints and patches, whatever their shape."""

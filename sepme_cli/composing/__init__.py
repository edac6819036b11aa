"""Patches and checkpoints together: whether they fit, and what comes of them."""

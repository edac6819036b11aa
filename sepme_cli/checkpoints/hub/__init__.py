"""Models and patches on the hub."""

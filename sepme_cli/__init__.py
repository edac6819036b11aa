"""sepme: take concepts out of Stable Diffusion checkpoints, and put them back."""

__version__ = "0.1.0"

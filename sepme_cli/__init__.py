"""sepme: take concepts out of Stable Diffusion checkpoints, and put them back."""

"""The English canvas: a small Stable Diffusion whose text encoder knows English."""

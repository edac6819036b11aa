"""Material to try sepme on: the emoji canvas, a small Stable Diffusion and its judge."""

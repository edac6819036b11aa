"""The emoji canvas: real artwork in eight named styles, and what is trained on it."""

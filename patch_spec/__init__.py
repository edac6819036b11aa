"""The `.sepme` patch format: SPEC.md is its text, this package its strict reader and writer.

`container` reads and writes files, `manifest` and `increment` are what is in them, `grid` and
`compose` are the arithmetic, `stack` and `undo` the records that patched checkpoints carry.
"""

"""Attacks on an erasure: what somebody may try to have a patched model draw a concept again."""

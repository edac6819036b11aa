"""Judging what a patch did, with the uncertainty said."""

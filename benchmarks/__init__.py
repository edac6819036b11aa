"""Measurements behind the figures that the documents quote."""

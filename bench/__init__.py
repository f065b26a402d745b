"""Measurements behind the figures in docs/scaling.md."""

"""Demonstrations to a trained policy."""

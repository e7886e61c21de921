"""From demonstrations to a trained policy."""

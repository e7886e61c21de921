"""What lies on disk between compiler and robot: written by the one, read by the other; no torch."""

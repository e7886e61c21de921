"""What to compile and build, and the values that every room shares; no torch."""

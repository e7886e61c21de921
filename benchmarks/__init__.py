"""Measurements of the compiler and of what it compiles; run as `python -m benchmarks.NAME`."""

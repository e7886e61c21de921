"""Lowerings of a finished graph to files that other runtimes read."""

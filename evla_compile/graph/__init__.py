"""Graphs of ATen operators: the pass contract, finding sites, weights computed when read, operation counts."""

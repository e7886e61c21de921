"""Proofs that an exported policy computes what the graph computes that it was exported from."""

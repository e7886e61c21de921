"""Proofs that an exported policy computes what it was made from."""

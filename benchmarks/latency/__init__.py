"""Latency of a policy's calls, by row and backend."""

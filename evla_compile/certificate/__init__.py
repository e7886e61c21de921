"""A certificate: how often a compiled policy deviates, bounded with a stated probability from episodes; no torch."""

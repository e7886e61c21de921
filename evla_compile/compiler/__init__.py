"""Configuration and plan to a rewritten, static graph and its report."""

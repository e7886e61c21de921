"""Find out what a machine lacks to compile, build or run a policy, and the remedy; no torch."""

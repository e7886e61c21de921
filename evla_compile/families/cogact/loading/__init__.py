"""CogACT's official checkpoints, unchanged, to a policy."""

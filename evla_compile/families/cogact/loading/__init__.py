"""Load CogACT's official checkpoints, unchanged."""

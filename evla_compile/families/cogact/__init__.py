"""CogACT: its modules, its checkpoints, its capture."""

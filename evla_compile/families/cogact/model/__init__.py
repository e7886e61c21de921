"""CogACT in plain torch, with the key names of its checkpoints."""

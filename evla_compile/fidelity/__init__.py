"""How far a policy's actions are from the dense policy's, on recorded frames and from equal noise; no torch."""

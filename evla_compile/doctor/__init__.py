"""What a machine lacks for a piece of work, and its remedy; no torch."""

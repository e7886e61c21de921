"""A policy in simulation: trained, compiled, and evaluated by success."""

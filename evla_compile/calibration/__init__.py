"""Frames to plan: what a policy can spare, measured on real observations."""

"""The robot's side of a policy: frames and instructions in, actions out; no torch."""

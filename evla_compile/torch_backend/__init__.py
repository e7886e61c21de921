"""`torch.compile(policy, backend="evla")`."""

"""Calibration: measure on real observations which layers and neurons a policy needs least."""

"""Runs an exported policy without torch: `load` it, then `predict_action` from camera frames."""

from evla_compile.runtime.policy import Provider, RuntimePolicy, load

__all__ = ["Provider", "RuntimePolicy", "load"]

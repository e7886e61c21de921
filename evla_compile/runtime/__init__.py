"""Runs an exported policy without torch: `load` it, then `predict_action` from camera frames."""

from evla_compile.runtime.policy import RuntimePolicy, load
from evla_compile.runtime.providers import Provider

__all__ = ["Provider", "RuntimePolicy", "load"]

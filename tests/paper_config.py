"""Configurations of EfficientVLA's method, for tests with fewer frames than a repair needs."""

from dataclasses import replace
from typing import Any

from evla_compile.settings.config import CompileConfig


def paper_config(**settings: Any) -> CompileConfig:
    """Return the paper's headline row with other settings: its own token rule, no merging, no repair."""
    return replace(CompileConfig.preset("l22-t56"), **settings)

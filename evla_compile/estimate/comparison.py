"""Compare upstream's policy with compiled ones, without weights, for `evla estimate`."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

import torch

from evla_compile.estimate.estimates import Estimate, estimate_upstream, quick_estimates
from evla_compile.families.cogact.loading.checkpoint import read_sound_checkpoint
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.sizes import ModelSizes, PublishedName, published_sizes

UPSTREAM = "upstream"
"""Name of the policy as upstream runs it."""

_PUBLISHED: Mapping[str, PublishedName] = MappingProxyType(
    {"s": "small", "small": "small", "b": "base", "base": "base", "l": "large", "large": "large"}
)


def sizes_of(size: str) -> ModelSizes:
    """Return the sizes of a published model, by its name or initial in any case, else of a run directory.

    Raises:
        CheckpointError: `size` is neither, or the checkpoint is refused; see `read_sound_checkpoint`.
        UnsupportedModelError: the architecture of the checkpoint is refused.
    """
    published = _PUBLISHED.get(size.lower())
    return read_sound_checkpoint(size).sizes if published is None else published_sizes(published)


def compare(
    sizes: ModelSizes,
    configs: Mapping[str, CompileConfig],
    *,
    dtype: torch.dtype,
    step: Callable[[str], AbstractContextManager[None]],
) -> dict[str, Estimate]:
    """Return the estimates of upstream's policy, first, and of compiled ones.

    Args:
        sizes: sizes of the dense policy.
        configs: at least one configuration by name.
        dtype: torch.float32 or torch.bfloat16, of vision and language.
        step: called with a description of each step; returns a context to run the step in.

    Raises:
        ValueError: a configuration's budget does not fit the sizes, or `dtype` is another.
    """
    for name, config in configs.items():
        try:
            config.resolve(sizes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    with step("count upstream's graph"):
        upstream = estimate_upstream(sizes, next(iter(configs.values())), dtype=dtype)
    with step(f"count the graphs of {', '.join(configs)}"):
        return {UPSTREAM: upstream} | quick_estimates(sizes, configs, dtype=dtype)

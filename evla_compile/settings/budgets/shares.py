"""Budgets that are a count, or a share of what a model has; no torch."""

from typing import Any, TypeAlias

from evla_compile.arguments import is_real, is_whole

Share: TypeAlias = float
"""A budget as a share of what the model has, above 0.0 and below 1.0. An int is a count instead, so 1 is one layer; 1.0
keeps everything, like None, where that is possible."""

NEURON_MULTIPLE = 64
"""MLP widths are rounded to multiples of this, since matrix units of GPUs compute in tiles of such sizes."""


def read_count_or_share(name: str, budget: Any) -> int | Share:
    """Return a budget as an int where it is a count, as a float where it is a share.

    Raises:
        ValueError: it is neither.
    """
    if is_whole(budget) and budget >= 1:
        return int(budget)
    if is_real(budget) and not is_whole(budget) and 0.0 < budget < 1.0:
        return float(budget)
    count = f"; as a count, write {budget:.0f}" if isinstance(budget, float) and budget in range(1, 10_000) else ""
    raise ValueError(f"{name}={budget!r}: expected a count from 1 up, or a share above 0.0 and below 1.0{count}")


def read_count_share_or_all(name: str, budget: Any) -> int | Share | None:
    """Return a budget as a plain value: None and the share 1.0, which would equal one as a count, both as None.

    Raises:
        ValueError: it is neither a count nor a share.
    """
    whole_share = is_real(budget) and not is_whole(budget) and budget == 1.0
    return None if budget is None or whole_share else read_count_or_share(name, budget)


def parse_count_or_share(text: str) -> int | Share:
    """Return a count where `text` is a whole number, else a share: "1" is one, "1.0" is all.

    Raises:
        ValueError: it is no number.
    """
    return int(text) if text.strip().lstrip("+-").isdigit() else float(text)


def parse_count_share_or_all(text: str) -> int | Share | None:
    """Return None for "all", else a count or a share.

    Raises:
        ValueError: it is no number.
    """
    return None if text == "all" else parse_count_or_share(text)


def count_of(budget: int | Share, whole: int) -> int:
    """Return a budget as a count, at least 1: a share is rounded to the nearest one, a half to the even one."""
    return max(1, round(budget * whole)) if isinstance(budget, float) else budget


def fitting(name: str, share: Share, whole: int) -> str:
    """Return values of a budget that fit, in words: `share` among them, which fits every model."""
    return (
        f"use {name}=1 to {whole}, or a share of them such as {name}={share:.2f}, which keeps {count_of(share, whole)}"
    )


def rounded_width(share: float, width: int) -> int:
    """Return how many of an MLP's `width` neurons stay: the share, rounded to a multiple of 64, at least 64."""
    if share == 1.0:
        return width
    return min(width, max(1, round(share * width / NEURON_MULTIPLE)) * NEURON_MULTIPLE)

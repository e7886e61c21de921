"""`evla estimate` and its output."""

# ruff: noqa: PLC0415 - torch takes seconds to import, so a command imports what it needs.

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Group, RenderableType
from rich.table import Table

import evla_compile as evla
from evla_compile.cli.arguments import read_place
from evla_compile.cli.console import new_table, print_json, step
from evla_compile.cli.setting_options import Settings, with_settings
from evla_compile.cli.settings import read_configs
from evla_compile.estimate.devices import DEVICES
from evla_compile.settings.config import PAPER_TEXT_TOKENS, CompileConfig
from evla_compile.terminal import new_console
from evla_compile.units import byte_scale, flop_scale, time_scale

if TYPE_CHECKING:
    from evla_compile.estimate.estimates import Estimate


@with_settings
def estimate(
    size: Annotated[
        str, typer.Argument(parser=read_place, metavar="SIZE", help="small, base or large (or S, B, L), or a RUN_DIR.")
    ],
    preset: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(sorted(evla.PRESETS))}, or all; may be repeated.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="The policy with exact rewrites alone.")] = False,
    *,
    settings: Settings,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Of vision and language; the action head is float32.")
    ] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare budgets before downloading any weight: size, operations and roofline of a policy and of its presets.

    Without --preset and --dense it shows all presets and the dense policy. Budgets change the presets that are named,
    else the default. The policy as upstream runs it is always the first row. The text has 26 tokens, as in the paper,
    without --text-tokens.
    """
    if settings["text_tokens"] is None:
        settings = {**settings, "text_tokens": PAPER_TEXT_TOKENS}
    configs = read_configs(settings, presets=preset or (), dense=dense)
    with step("import torch and transformers"):
        import torch

        from evla_compile.estimate.comparison import compare, sizes_of
    found = compare(sizes_of(size), configs, dtype=getattr(torch, dtype), step=step)
    if as_json:
        print_json({name: estimated.to_json() for name, estimated in found.items()})
    else:
        new_console().print(estimate_summary(found, next(iter(configs.values()))))


def estimate_summary(estimates: "Mapping[str, Estimate]", config: CompileConfig) -> RenderableType:
    """Return sizes and operations of policies, in total and by component, and their rooflines, as tables.

    Args:
        estimates: estimates by name, in one dtype; the one that the others are compared with is named `upstream`.
        config: the batch size, text tokens and denoising steps of all estimates.
    """
    dtype = estimates["upstream"].dtype
    return Group(
        estimate_table(estimates),
        component_table(estimates),
        roofline_table(estimates),
        f"One call at batch {config.batch_size}, {config.text_tokens} text tokens, {config.ddim_steps} denoising steps"
        " where the sampler is DDIM;"
        f" vision and language in {dtype}, the action head in float32.\n"
        "FLOP count all that is executed; FLOP (paper) as EfficientVLA printed them: linear layers, convolutions and"
        " layer norms, no attention products. The last column is its share of upstream's.\n"
        "The roofline is a lower bound of a call's time: every weight read once, activations free, all at the"
        " datasheet's peak. A dash: the weights alone exceed the memory.",
    )


def estimate_table(estimates: "Mapping[str, Estimate]") -> Table:
    """Return size and operations of each policy, and its share of the operations of the one named `upstream`."""
    totals = [estimate.total for estimate in estimates.values()]
    size, work = byte_scale(total.weight_bytes for total in totals), flop_scale(total.flops for total in totals)
    table = new_table(
        "Size and operations",
        "policy",
        right=("parameters", f"weights {size.unit}", work.unit, f"{work.unit} (paper)", "% of upstream"),
    )
    upstream = estimates["upstream"].total.paper_flops
    for name, estimate in estimates.items():
        total = estimate.total
        numbers = (
            work.show(total.flops),
            work.show(total.paper_flops),
            f"{total.paper_flops / upstream:.1%}",
        )
        table.add_row(name, f"{total.parameters:,}", size.show(total.weight_bytes), *numbers)
    return table


def component_table(estimates: "Mapping[str, Estimate]") -> Table:
    """Return size and operations of each component of each policy."""
    footprints = [footprint for estimate in estimates.values() for footprint in estimate.components.values()]
    work, size = flop_scale(each.flops for each in footprints), byte_scale(each.weight_bytes for each in footprints)
    columns = (f"{name}\n{unit}" for unit in (work.unit, size.unit) for name in ("vision", "language", "action"))
    table = new_table("By component", "policy", right=tuple(columns))
    for name, estimate in estimates.items():
        components = estimate.components.values()
        flops, weights = [each.flops for each in components], [each.weight_bytes for each in components]
        table.add_row(name, *map(work.show, flops), *map(size.show, weights))
    return table


def roofline_table(estimates: "Mapping[str, Estimate]") -> Table:
    """Return a lower bound of a call's time on every named device; a dash where the weights exceed its memory."""
    bounds = {
        device: [
            estimate.roofline_seconds(device) if estimate.fits(device) else None for estimate in estimates.values()
        ]
        for device in DEVICES.values()
    }
    times = time_scale(bound for row in bounds.values() for bound in row if bound is not None)
    memory = byte_scale(device.memory_bytes for device in bounds)
    table = new_table(f"Roofline, {times.unit}", "device", right=(memory.unit, *estimates))
    table.columns[0].no_wrap = True
    for device, row in bounds.items():
        shown = ("-" if bound is None else times.show(bound) for bound in row)
        table.add_row(device.name, f"{device.memory_bytes / memory.size:.0f}", *shown)
    return table

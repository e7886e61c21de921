"""`evla inspect` and its output."""

# ruff: noqa: PLC0415 - torch takes seconds to import, so a command imports what it needs.

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from evla_compile.artifact.files import find_manifest
from evla_compile.artifact.manifest import Manifest, read_manifest
from evla_compile.cli.arguments import read_place
from evla_compile.cli.build import describe_engine
from evla_compile.cli.console import new_table, step
from evla_compile.terminal import in_one_line, new_console
from evla_compile.units import Scale, byte_scale

if TYPE_CHECKING:
    from torch import Tensor

    from evla_compile.families.cogact.loading.checkpoint import Checkpoint


def inspect(
    path: Annotated[
        str, typer.Argument(parser=read_place, metavar="PATH", help="A RUN_DIR, or the DIR of a compiled policy.")
    ],
) -> None:
    """Show what is in a checkpoint or a compiled policy, without reading its weights."""
    console = new_console()
    place = Path(path)
    if place.suffix in (".onnx", ".json") or (place / "manifest.json").is_file():
        console.print(manifest_table(read_manifest(find_manifest(place))))
        return
    with step("import torch"):
        from evla_compile.families.cogact.loading.checkpoint import read_sound_checkpoint
    console.print(checkpoint_summary(read_sound_checkpoint(path)))
    console.print(
        f"What it computes and how fast devices could run it:\n  evla estimate {shlex.quote(path)}", soft_wrap=True
    )


def checkpoint_summary(checkpoint: "Checkpoint") -> RenderableType:
    """Return the contents of a run directory."""
    side, found = checkpoint.sizes.image_side, (checkpoint.run / "tokenizer.json").is_file()
    return Group(
        checkpoint_table(checkpoint),
        f"frame: {side} x {side} pixels",
        f"datasets: {in_one_line(', '.join(sorted(checkpoint.statistics)))}",
        f"tokenizer: {'tokenizer.json in the run directory' if found else 'none here; give --tokenizer'}\n",
    )


def checkpoint_table(checkpoint: "Checkpoint") -> Table:
    """Return the modules of a checkpoint with their sizes, parameters and stored dtypes."""
    sizes = checkpoint.sizes
    language, action = sizes.language, sizes.action
    towers = {
        f"vision_backbone.{name}_featurizer": f"{tower.depth} blocks of {tower.width}, {tower.heads} heads, MLP"
        f" {tower.mlp_width}, {tower.patches} patches"
        for name, tower in (("dino", sizes.dino), ("siglip", sizes.siglip))
    }
    modules = {
        **towers,
        "projector": " -> ".join(map(str, sizes.projector)),
        "llm_backbone": f"{language.layers} layers of {language.width}, {language.heads} heads ({language.kv_heads} of"
        f" keys), MLP {language.mlp_width}, vocabulary {language.vocabulary}",
        "action_model": f"{action.depth} blocks of {action.width}, {action.heads} heads, MLP {action.mlp_width}, chunk"
        f" {action.chunk} x {action.action_width}",
    }
    scale = byte_scale((sum(tensor.nbytes for tensor in checkpoint.tensors.values()),))
    table = new_table(None, "module", "sizes", right=("parameters", "dtype", scale.unit))
    table.columns[0].no_wrap = True
    for module, description in modules.items():
        tensors = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith(f"{module}.")]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        table.add_row(module, description, *_stored(tensors, ", ".join(dtypes), scale))
    table.add_section()
    table.add_row("total", "", *_stored(checkpoint.tensors.values(), "", scale))
    return table


def manifest_table(manifest: Manifest) -> Table:
    """Return the contents of a manifest as a table."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, value: str) -> None:
        table.add_row(in_one_line(name), in_one_line(value))

    add("made by", f"evla_compile {manifest.created_by}, ONNX opset {manifest.opset}")
    for name, value in manifest.config.to_json().items():
        add(name, "all" if value is None else str(value))
    for kind, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            add(kind, str(spec))
    add("datasets", ", ".join(sorted(manifest.statistics)))
    plan = manifest.plan
    add("layers kept", ", ".join(map(str, plan.keep_layers)))
    add("calibrated on", f"{plan.frames} frames" + (f", digest {plan.frames_digest}" if plan.frames_digest else ""))
    if plan.checkpoint:
        add("weights", ", ".join(f"{group} {fingerprint}" for group, fingerprint in plan.checkpoint))
    if manifest.precision != "float32":
        add("precision", manifest.precision)
    if manifest.engine is not None:
        add("engine", describe_engine(manifest.engine))
    for record in manifest.files:
        add("file", f"{record.name}, {record.size:,} bytes, SHA-256 {record.sha256[:12]}...")
    add("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    return table


def _stored(tensors: "Iterable[Tensor]", dtypes: str, scale: Scale) -> tuple[str, str, str]:
    tensors = list(tensors)
    return f"{sum(t.numel() for t in tensors):,}", dtypes, scale.show(sum(t.nbytes for t in tensors))

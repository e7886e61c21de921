"""`evla build` and its output."""

# ruff: noqa: PLC0415 - torch takes seconds to import, so a command imports what it needs.

from pathlib import Path
from typing import Annotated

import typer

from evla_compile.artifact.records import EngineRecord
from evla_compile.cli.arguments import Artifact, read_path
from evla_compile.cli.console import step
from evla_compile.settings.engine_settings import FLAVOUR_NAMES, EngineSettings, Flavour
from evla_compile.terminal import new_console
from evla_compile.units import bytes_text


def build(
    artifact: Artifact,
    flavour: Annotated[
        Flavour | None, typer.Option(help="TensorRT on the GPU that will run it, or TensorRT-RTX ahead of time.")
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option(metavar="X.Y", help="GPU to build for, such as 8.9; repeat for several. TensorRT-RTX only."),
    ] = None,
    workspace_gb: Annotated[float | None, typer.Option(help="Most GPU memory for one layer's intermediates.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Most memory for the builder; else what is free.")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="0 to 5: how long to look. TensorRT only.")] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            parser=read_path, metavar="FILE", help="Keep what was measured for the next build. TensorRT only."
        ),
    ] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="For every GPU from 8.0 on. TensorRT only, no Jetson.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="For later TensorRT too. TensorRT only.")
    ] = False,
) -> None:
    """Build the TensorRT engines of a compiled policy beside its ONNX files; imports no torch."""
    from evla_compile.exporters.build import build_engine

    settings = EngineSettings(
        flavour=flavour,
        compute_capabilities=tuple(capability or ()),
        workspace_bytes=None if workspace_gb is None else round(workspace_gb * 1e9),
        memory_bytes=None if memory_gb is None else round(memory_gb * 1e9),
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
    )
    with step("build the engine", spinner=False):  # it draws its own progress bars
        engine = build_engine(artifact, settings).engine
    if engine is not None:
        files = ", ".join(f"{record.name} ({bytes_text(record.size)})" for record in engine.files)
        new_console().print(f"built {files}: {describe_engine(engine)}")


def describe_engine(engine: EngineRecord) -> str:
    """Return one line about an artifact's engines: library, version and GPUs that they run on."""
    built_on = engine.gpu or engine.platform
    targets = ", ".join(engine.compute_capabilities) or "8.0, 8.6, 8.9 and 12.x"
    layers = " + ".join(f"{count:,}" for count in engine.layers)
    return (
        f"{FLAVOUR_NAMES[engine.flavour]} {engine.version}, compute capability {targets}, {layers} layers, {built_on}"
    )

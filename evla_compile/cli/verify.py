"""`evla verify` and its output."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import evla_compile as evla
from evla_compile.cli.arguments import Artifact
from evla_compile.cli.console import new_table, step
from evla_compile.runtime import Provider
from evla_compile.terminal import new_console

if TYPE_CHECKING:
    from evla_compile.verification.verify import Verification


def verify(
    artifact: Artifact,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime.")] = None,
    provider: Annotated[
        Provider | None, typer.Option(help="Where the runtime computes; engine for the TensorRT engine.")
    ] = None,
    stages: Annotated[bool, typer.Option("--stages", help="Show every stage.")] = False,
) -> None:
    """Prove that an artifact is intact, has static shapes, and computes what its float32 torch graph computed."""
    with step("verify on ONNX Runtime" if provider in (None, "cpu") else f"verify on {provider}"):
        found = evla.verify(artifact, threads=threads, provider=provider)
    if stages:
        new_console().print(stage_table(found))
    errors = ", ".join(f"{name} {error:.1e}" for name, error in found.errors)
    new_console().print(
        f"verified: files as the manifest says; {found.nodes} operators, all shapes static; {found.cases} recorded"
        f" cases, {len(found.stages)} stages each, largest relative error {errors} (tolerance {found.tolerance:.0e})"
    )
    if found.fidelity is not None:
        new_console().print(f"when it was compiled, {found.fidelity.line()}\n{found.fidelity.how_to_read()}")


def stage_table(found: "Verification") -> Table:
    """Return the error of every stage of an artifact against the float32 torch graph."""
    table = new_table("Against float32 torch", "stage", right=("relative error",))
    for name, error in found.stages:
        table.add_row(name, f"{error:.1e}")
    return table

"""`evla doctor` and its output."""

# ruff: noqa: PLC0415 - torch takes seconds to import, so a command imports what it needs.

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from evla_compile.cli.arguments import read_path, read_place
from evla_compile.cli.console import new_table, print_json, step
from evla_compile.cli.setting_options import Dense, Preset, Settings, with_settings
from evla_compile.cli.settings import read_config
from evla_compile.runtime import Provider
from evla_compile.settings.engine_settings import Flavour
from evla_compile.settings.precision import Precision
from evla_compile.terminal import new_console

if TYPE_CHECKING:
    from evla_compile.doctor.request import Finding
    from evla_compile.doctor.survey import Survey


@with_settings
def doctor(
    work: Annotated[
        Literal["compile", "run", "build"] | None, typer.Argument(help="What this machine is to do.")
    ] = None,
    artifact: Annotated[
        Path | None, typer.Option(parser=read_path, metavar="DIR", help="The compiled policy to run or build.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            parser=read_place, metavar="SIZE", help="Without an artifact: small, base, large or a RUN_DIR. Needs torch."
        ),
    ] = None,
    preset: Preset = None,
    dense: Dense = False,
    *,
    settings: Settings,
    precision: Annotated[Precision | None, typer.Option(help="Of that size's export; float32 by default.")] = None,
    provider: Annotated[Provider | None, typer.Option(help="For run: where to compute.")] = None,
    flavour: Annotated[Flavour | None, typer.Option(help="For build and to run an engine: the library.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check whether this machine can compile, run or build, and how to fix what it lacks.

    The size of the policy is that of the artifact, or of --size with the settings to compile it by.

    Exit status 0: it can. 1: it cannot. 2: the options are wrong. Without a kind of work, it shows what is installed
    and what can be done with it, and status 1 means that something installed is broken.
    """
    from evla_compile.doctor.request import make_request
    from evla_compile.doctor.survey import examine, stored_bytes

    described = dense or any(given is not None for given in (preset, precision, *settings.values()))
    if work is None:
        if described or any(given is not None for given in (artifact, size, provider, flavour)):
            raise ValueError("expected compile, run or build in front of these options: evla doctor run --artifact DIR")
        _survey(as_json=as_json)
        return
    if size is None and described:
        raise ValueError("--preset, --dense, --precision and budgets describe --size: give it too, or leave them out")
    config = read_config(settings, preset=preset, dense=dense)
    weight_bytes = None if size is None else stored_bytes(size, config, precision or "float32")
    request = make_request(
        work,
        provider=provider,
        flavour=flavour,
        artifact=artifact,
        weight_bytes=weight_bytes,
        precision=precision or "float32",
    )
    with step("look at this machine"):
        found = examine(request)
    failed = [finding.check for finding in found if finding.status == "failed"]
    if as_json:
        print_json({"can": not failed, "findings": [finding.to_json() for finding in found]})
    else:
        new_console().print(findings_table(found))
        _print_remedies(found)
        what = request.describe()
        new_console().print(f"cannot {what}: see {', '.join(failed)}" if failed else f"can {what}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _survey(*, as_json: bool) -> None:
    """Print what is installed on this machine, and what can be done with it."""
    from evla_compile.doctor.survey import survey_machine

    with step("look at this machine"):
        found = survey_machine()
    broken = [finding for finding in found.findings if finding.status == "failed"]
    if as_json:
        print_json(found.to_json())
    else:
        new_console().print(findings_table(found.findings), works_table(found))
        _print_remedies(broken)
        new_console().print(
            f"broken: {', '.join(finding.check for finding in broken)}" if broken else "nothing that is here is broken"
        )
    if broken:
        raise typer.Exit(1)


def _print_remedies(findings: Iterable["Finding"]) -> None:
    lines = remedies(findings)
    if lines:
        new_console().print("What to do:", *(f"  {line}" for line in lines), "", sep="\n", soft_wrap=True)


def findings_table(findings: Iterable["Finding"]) -> Table:
    """Return the findings as a table."""
    table = new_table(None, "check", "", "found")
    table.columns[0].no_wrap = True
    for finding in findings:
        table.add_row(finding.check, finding.status, finding.found)
    return table


def remedies(findings: Iterable["Finding"]) -> tuple[str, ...]:
    """Return the remedies of findings, a line each, unbroken so that commands in them can be copied."""
    checks: dict[str, list[str]] = {}
    for finding in findings:
        if finding.remedy is not None:
            checks.setdefault(finding.remedy, []).append(finding.check)
    return tuple(f"{', '.join(names)}: {remedy}" for remedy, names in checks.items())


def works_table(found: "Survey") -> Table:
    """Return a table of what can be done on a machine, and of the failed checks that prevent the rest."""
    table = new_table(None, "evla doctor ...", "", "failed checks")
    table.columns[0].no_wrap = True
    for request, lacks in found.lacks:
        table.add_row(request.arguments(), "cannot" if lacks else "can", ", ".join(lacks))
    return table

"""The options for settings of a compilation, shared by all commands that have them: one for each setting."""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias, get_type_hints

import typer

from evla_compile.settings.config import PRESETS, CompileConfig
from evla_compile.settings.setting import settings_of

Settings: TypeAlias = Mapping[str, Any]
"""Value of the option of each setting of `CompileConfig`, by name; None where the option was not given."""

Preset = Annotated[str | None, typer.Option(help=f"Start from {', '.join(sorted(PRESETS))}.")]
Dense = Annotated[bool, typer.Option("--dense", help="Start from keeping everything.")]


def _options() -> dict[str, Any]:
    """Return the type and help of every setting's option, as its declaration says them."""
    types = get_type_hints(CompileConfig)
    options = {}
    for name, about in settings_of(CompileConfig).items():
        kind: Any = str if about.parse is not None else types[name]
        options[name] = Annotated[kind | None, typer.Option(metavar=about.metavar, help=about.text)]
    return options


OPTIONS: Mapping[str, Any] = MappingProxyType(_options())
"""Type and help of the option of each setting of `CompileConfig`, in their order."""


def parse_options(settings: Settings) -> dict[str, Any]:
    """Return the settings that were given, their texts read.

    Raises:
        ValueError: a text is malformed; the message names the option and the forms that it takes.
    """
    found = {}
    for name, about in settings_of(CompileConfig).items():
        value = settings[name]
        if value is None:
            continue
        if about.parse is not None:
            try:
                value = about.parse(value)
            except ValueError as error:
                raise ValueError(f"{option_name(name)} {value}: expected {about.forms}") from error
        found[name] = value
    return found


def option_name(setting: str) -> str:
    """Return the option of a setting, as it is typed."""
    return f"--{setting.replace('_', '-')}"


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `settings` by the options of all settings; the command gets their values in it."""
    parameters: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        if parameter.name != "settings":
            parameters.append(parameter)
            continue
        parameters += [
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=option)
            for name, option in OPTIONS.items()
        ]

    @wraps(command)
    def run(**arguments: Any) -> None:
        settings = {name: arguments.pop(name) for name in OPTIONS}
        command(**arguments, settings=settings)

    # typer reads these two attributes to create the options
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]  # of inspect
    return run

"""The options for settings of a compilation, shared by all commands that have them: one for each setting."""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

import typer

from evla_compile.settings.config import PRESETS, LayerRule

Settings: TypeAlias = Mapping[str, Any]
"""Value of the option of each setting of `CompileConfig`, by name; None where the option was not given."""

Preset = Annotated[str | None, typer.Option(help=f"Start from {', '.join(sorted(PRESETS))}.")]
Dense = Annotated[bool, typer.Option("--dense", help="Start from keeping everything.")]

OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "keep_layers": Annotated[str | None, typer.Option(metavar="N|SHARE|i,j,k|all", help="Decoder layers kept.")],
        "layer_rule": Annotated[
            LayerRule | None, typer.Option(help="Which layers go: the paper's importance, or one after the other.")
        ],
        "mlp_keep": Annotated[float | None, typer.Option(help="Share of each kept MLP's neurons kept.")],
        "visual_tokens": Annotated[str | None, typer.Option(metavar="N|SHARE|all", help="Visual tokens kept.")],
        "key_tokens": Annotated[
            str | None, typer.Option(metavar="N|SHARE", help="Of these, always kept by relevance.")
        ],
        "task_share": Annotated[float | None, typer.Option(help="Share of the others kept by relevance.")],
        "cache_interval": Annotated[
            int | None, typer.Option(help="Denoising steps from one recomputation to the next.")
        ],
        "ddim_steps": Annotated[int | None, typer.Option(help="Denoising steps.")],
        "cfg_scale": Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 for none.")],
        "text_tokens": Annotated[int | None, typer.Option(help="Text budget in tokens.")],
        "batch_size": Annotated[int | None, typer.Option(help="Static batch size.")],
    }
)
"""Type and help of the option of each setting of `CompileConfig`, in their order."""


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

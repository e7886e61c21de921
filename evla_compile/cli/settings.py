"""Turn options of the command line into settings and plans; imports no torch."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evla_compile.artifact.files import find_manifest
from evla_compile.artifact.manifest import read_manifest
from evla_compile.cli.setting_options import Settings, option_name, parse_options
from evla_compile.settings.config import PRESETS, CallSettings, CompileConfig
from evla_compile.settings.plan import Plan
from evla_compile.settings.setting import settings_of

_OF_EVERY_ROW = settings_of(CallSettings)  # settings of the call, not budgets


def read_configs(settings: Settings, *, presets: Collection[str], dense: bool) -> dict[str, CompileConfig]:
    """Return the configurations to compare, by name.

    1. Without budgets: the presets and the dense policy that are named, or all.
    2. With budgets and nothing named: the default with these budgets, and the dense policy beside it.
    3. With budgets and names: each of those that are named, with these budgets.

    Args:
        settings: values of the options of all settings.
        presets: names of presets; "all" for all.
        dense: whether the policy with exact rewrites alone is named.

    Raises:
        ValueError: there is no such preset, the options contradict each other, or one is malformed or out of its range.
    """
    shared = {name: value if name in _OF_EVERY_ROW else None for name, value in settings.items()}
    budgets = [name for name, value in settings.items() if value is not None and name not in _OF_EVERY_ROW]
    named = list(PRESETS) if "all" in presets else list(presets)
    starts = [*(["dense"] if dense else []), *named]
    if budgets and not starts:  # 2
        return {
            "dense": read_config(shared, preset=None, dense=True),
            "custom": read_config(settings, preset=None, dense=False),
        }
    found = {}
    for start in starts or ["dense", *PRESETS]:
        name = start if not budgets else "custom" if len(starts) == 1 else f"custom {start}"
        is_dense = start == "dense"
        found[name] = read_config(settings, preset=None if is_dense else start, dense=is_dense)
    return found


def read_config(settings: Settings, *, preset: str | None, dense: bool) -> CompileConfig:
    """Return the configuration asked for.

    Raises:
        ValueError: the options contradict each other, or one is malformed or out of its range.
    """
    if dense and preset is not None:
        raise ValueError(f"--dense and --preset {preset} exclude each other: give the one to start from")
    base = CompileConfig()
    if dense:
        base = CompileConfig.dense()
    elif preset is not None:
        base = CompileConfig.preset(preset)
    given = parse_options(settings)
    config = replace(base, **given)
    _refuse_idle(config, given)
    return config


def _refuse_idle(config: CompileConfig, given: Mapping[str, Any]) -> None:
    """Refuse options that have no effect together with the others, since the user must expect an effect.

    Raises:
        ValueError: there is one.
    """
    for name, reason in config.idle_settings().items():
        if name in given:
            option, value = option_name(name), given[name]
            typed = f"{option} {value}"
            if isinstance(value, bool):  # a pair of flags
                option = typed = option if value else option.replace("--", "--no-", 1)
            raise ValueError(f"{typed} would have no effect, since {reason}, or leave {option} out")


def read_plan(path: Path) -> Plan:
    """Return the plan of a file that `Plan.save` wrote, or the one of a compiled policy.

    Raises:
        ArtifactError: the path is a folder or an ONNX file that is no compiled policy.
        CalibrationError: the file cannot be read or is no plan, or its tensors are missing or other ones.
    """
    if path.is_dir() or path.suffix == ".onnx":
        place = find_manifest(path)
        manifest = read_manifest(place)
        return (
            manifest.plan
            if manifest.tensors is None
            else manifest.plan.with_tensors(place.with_name(manifest.tensors.name))
        )
    return Plan.load(path)

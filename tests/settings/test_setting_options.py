"""The options of settings: one for each, in every command that compiles, counts or checks for a compilation."""

from typing import Any

import pytest
import typer.main

from evla_compile import cli
from evla_compile.cli import estimate
from evla_compile.cli.setting_options import OPTIONS
from evla_compile.cli.settings import read_configs
from evla_compile.doctor import survey as doctor
from evla_compile.errors import EvlaError
from evla_compile.estimate import comparison
from evla_compile.settings.config import PRESETS, CompileConfig
from tests.cli.command_line import evla, refused

NOTHING = dict.fromkeys(OPTIONS)
GIVEN: dict[str, Any] = {
    "keep_layers": "0.5",
    "layer_rule": "greedy",
    "mlp_keep": 0.5,
    "vision_mlp_keep": 0.5,
    "visual_tokens": "0.25",
    "token_rule": "relevance",
    "key_tokens": "3",
    "task_share": 0.25,
    "merge_tokens": True,
    "repair": "gaps",
    "repair_rho": "0.1",
    "repair_weights": "0.5,1,10",
    "repair_frames": 30,
    "ddim_steps": 5,
    "solver": "ddim",
    "solver_steps": None,
    "solver_timesteps": None,
    "cache_interval": 2,
    "cache_steps": "uniform",
    "cache_extrapolate": True,
    "cfg_scale": 1.0,
    "text_tokens": 20,
    "batch_size": 2,
}
WEIGHTS = (0.5, 1.0, 10.0)
READ = {"keep_layers": 0.5, "visual_tokens": 0.25, "key_tokens": 3, "repair_rho": 0.1, "repair_weights": WEIGHTS}
READ["cache_steps"] = None
CONFIG = CompileConfig(**GIVEN | READ)
ARGUMENTS = [
    word
    for name, value in GIVEN.items()
    if value is not None  # of another solver
    for word in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
]


def test_every_setting_has_an_option() -> None:
    assert list(OPTIONS) == list(CompileConfig().to_json())
    assert [name for name in OPTIONS if name not in GIVEN] == ["token_seed"]  # of a rule without the other options


@pytest.mark.parametrize("command", ["compile", "estimate", "doctor"])
def test_commands_have_the_same_options_of_settings(command: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    options = {parameter.name: parameter for parameter in group.commands[command].params}
    reference = {parameter.name: parameter for parameter in group.commands["compile"].params}
    for name in OPTIONS:
        assert options[name].opts == [f"--{name.replace('_', '-')}"]
        assert (options[name].help, options[name].default) == (reference[name].help, None)
    assert "settings" not in options


def test_without_a_choice_everything_is_compared() -> None:
    assert list(read_configs(NOTHING, presets=(), dense=False)) == ["dense", *PRESETS]


@pytest.mark.parametrize(
    ("presets", "dense", "expected"),
    [
        ((), True, ["dense"]),
        (("l22-t56", "l28-t56"), False, ["l22-t56", "l28-t56"]),
        (("l22-t56",), True, ["dense", "l22-t56"]),
        (("all",), False, list(PRESETS)),
        (("all",), True, ["dense", *PRESETS]),
    ],
)
def test_a_choice_is_followed(presets: tuple[str, ...], dense: bool, expected: list[str]) -> None:
    call = {"text_tokens": 20, "batch_size": 2, "ddim_steps": 5, "cfg_scale": 1.0}
    found = read_configs(NOTHING | call, presets=presets, dense=dense)
    assert list(found) == expected
    for name, config in found.items():
        base = CompileConfig.dense() if name == "dense" else PRESETS[name]
        assert config == CompileConfig(**base.to_json() | call)


@pytest.mark.parametrize(
    ("presets", "dense", "expected"),
    [
        ((), False, {"dense": (None, None), "custom": (10, 56 / 256)}),
        (("l28-t112",), False, {"custom": (10, 112 / 256)}),
        ((), True, {"custom": (10, None)}),
        (("l28-t112",), True, {"custom dense": (10, None), "custom l28-t112": (10, 112 / 256)}),
    ],
)
def test_budgets_change_what_is_named_or_else_the_default(
    presets: tuple[str, ...], dense: bool, expected: dict[str, tuple[Any, ...]]
) -> None:
    found = read_configs(NOTHING | {"keep_layers": "10", "text_tokens": 20}, presets=presets, dense=dense)
    assert {name: (config.keep_layers, config.visual_tokens) for name, config in found.items()} == expected
    assert {config.text_tokens for config in found.values()} == {20}


def test_estimate_counts_the_policy_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compare(sizes: Any, configs: Any, **_: object) -> None:
        asked.append((sizes.language.layers, configs))
        raise EvlaError("counted")

    monkeypatch.setattr(comparison, "compare", compare)
    assert refused(evla("estimate", "base", "--preset", "l28-t56", *ARGUMENTS)) == "counted"
    assert refused(evla("estimate", "base", "--dense")) == "counted"
    assert asked == [(32, {"custom": CONFIG}), (32, {"dense": CompileConfig.dense(text_tokens=26)})]


def test_doctor_weighs_the_policy_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stored_bytes(*arguments: object) -> int:
        asked.append(arguments)
        raise EvlaError("weighed")

    monkeypatch.setattr(doctor, "stored_bytes", stored_bytes)
    for arguments in (ARGUMENTS, ("--dense", "--precision", "bfloat16")):
        assert refused(evla("doctor", "run", "--size", "base", *arguments)) == "weighed"
    assert asked == [("base", CONFIG, "float32"), ("base", CompileConfig.dense(), "bfloat16")]


@pytest.mark.parametrize("arguments", [("--dense",), ("--keep-layers", "3"), ("--preset", "l22-t56")])
def test_doctor_takes_settings_with_a_size_alone(arguments: tuple[str, ...]) -> None:
    message = refused(evla("doctor", "run", *arguments))
    assert message == "--preset, --dense, --precision and budgets describe --size: give it too, or leave them out"
    assert "expected compile, run or build in front of these options" in refused(evla("doctor", *arguments))


@pytest.mark.parametrize("command", [("estimate", "base"), ("doctor", "run", "--size", "base")])
def test_settings_are_refused_before_torch_is_imported(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "step", lambda what: pytest.fail(f"{what} before the refusal"))
    monkeypatch.setattr(doctor, "stored_bytes", lambda *_: pytest.fail("torch was imported before the refusal"))
    for arguments, message in (
        (("--keep-layers", "4.5"), "keep_layers=4.5: expected a count from 1 up, or a share above 0.0 and below 1.0"),
        (("--preset", "l9"), "unknown preset 'l9'; expected one of balanced"),
        (("--dense", "--key-tokens", "9"), "--key-tokens 9 would have no effect"),
    ):
        assert message in refused(evla(*command, *arguments))

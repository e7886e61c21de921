"""Options: help that fits a terminal, paths that are empty, options that decide nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import evla_compile
from evla_compile.cli.compile import compile_summary
from evla_compile.cli.next_steps import print_next
from evla_compile.cli.settings import read_config
from evla_compile.compiler.report import CompileReport
from evla_compile.graph.contract import GraphStats, PassReport
from evla_compile.settings.config import CompileConfig
from evla_compile.terminal import new_console
from tests.cli.command_line import evla, refused

COMMANDS = ("demo", "frames", "compile", "inspect", "estimate", "run", "build", "verify", "fidelity", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_with_its_words_whole(command: str) -> None:
    outcome = evla(command, "--help")
    assert not outcome.status
    assert max(map(len, outcome.out.splitlines())) <= 80
    whole = {
        "compile": ("<importance|greedy>", "<float32|bfloat16|float16>", "--verify / --no-verify"),
        "run": ("<cpu|cuda|tensorrt|openvino|engine>",),
        "build": ("<tensorrt|tensorrt_rtx>",),
    }
    for words in whole.get(command, ("--help",)):
        assert words in outcome.out


def test_the_list_of_commands_cuts_no_sentence() -> None:
    outcome = evla("--help")
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "..." not in outcome.out.partition("Commands:")[2]
    assert [line.split()[0] for line in outcome.out.partition("Commands:")[2].split("\n") if line] == [*COMMANDS]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("demo", "--out", ""), "--out"),
        (("compile", "run", "--out="), "--out"),
        (("compile", "", "--out", "x"), "RUN_DIR"),
        (("compile", "run", "--out", "x", "--calibration", ""), "--calibration"),
        (("compile", "run", "--out", "x", "--plan", ""), "--plan"),
        (("compile", "run", "--out", "x", "--tokenizer", ""), "--tokenizer"),
        (("frames", "", "--out", "x"), "SOURCE"),
        (("frames", "bag", "--out", ""), "--out"),
        (("inspect", ""), "PATH"),
        (("estimate", ""), "SIZE"),
        (("run", "", "--image", "x", "--instruction", "go"), "DIR"),
        (("run", "x", "--image", "", "--instruction", "go"), "--image"),
        (("run", "x", "--image", "y", "--instruction", "go", "--cache", ""), "--cache"),
        (("build", "x", "--timing-cache", ""), "--timing-cache"),
        (("verify", ""), "DIR"),
        (("doctor", "run", "--artifact", ""), "--artifact"),
        (("doctor", "run", "--size", ""), "--size"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(arguments: tuple[str, ...], option: str) -> None:
    outcome = evla(*arguments, columns=200)
    assert outcome.status == 2
    assert not outcome.out
    assert f"Invalid value for '{option}': expected a path, found an empty text" in outcome.message


@pytest.mark.parametrize(
    ("given", "dense", "expected"),
    [
        ({"key_tokens": "99"}, True, "--key-tokens 99 would have no effect, since every visual token is kept"),
        ({"task_share": 0.5}, True, "--task-share 0.5 would have no effect"),
        ({"visual_tokens": "all", "key_tokens": "4"}, False, "leave --key-tokens out"),
        (
            {"token_rule": "coverage"},
            True,
            "--token-rule coverage would have no effect, since every visual token is kept",
        ),
        (
            {"merge_tokens": True},
            True,
            "^--merge-tokens would have .* since every visual .* or leave --merge-tokens out",
        ),
        ({"merge_tokens": False}, True, "^--no-merge-tokens would have no effect, .* or leave --no-merge-tokens out"),
        (
            {"token_seed": 1},
            False,
            "--token-seed 1 .* since the rule coverage draws nothing; give --token-rule random",
        ),
        (
            {"token_rule": "fastv", "key_tokens": "4"},
            False,
            "--key-tokens 4 .* since the rule fastv keeps no tokens by it; give --token-rule relevance",
        ),
        ({"token_rule": "random", "task_share": 0.2}, False, "the rule random keeps no tokens by it"),
        ({"layer_rule": "greedy"}, True, "--layer-rule greedy would have no effect, since no layer is left to a rule"),
        ({"keep_layers": "0,1,4", "layer_rule": "importance"}, False, "give --keep-layers a count"),
        ({"cache_steps": "0,3,7", "cache_interval": 5}, True, "says which steps compute; give --cache-steps uniform"),
        ({"solver": "dpm++", "solver_steps": 3, "cache_interval": 5}, True, "computes every step; give --solver ddim"),
        ({"cache_extrapolate": True}, True, "no step is reused behind two computed ones; give --cache-steps"),
        ({"cache_extrapolate": False, "cache_steps": "0,"}, True, "no step is reused behind two computed ones"),
    ],
)
def test_an_option_that_decides_nothing_is_refused(given: dict[str, object], dense: bool, expected: str) -> None:
    options = dict.fromkeys(CompileConfig().to_json()) | given
    with pytest.raises(ValueError, match=expected):
        read_config(options, preset=None, dense=dense)


@pytest.mark.parametrize(
    ("text", "expected"), [("3", 3), ("0,3,7", (0, 3, 7)), ("0,", (0,)), (" 0, 6 ", (0, 6)), ("uniform", None)]
)
def test_cache_steps_are_a_number_or_named(text: str, expected: object) -> None:
    options = dict.fromkeys(CompileConfig().to_json()) | {"cache_steps": text}
    assert read_config(options, preset=None, dense=True).cache_steps == expected
    with pytest.raises(ValueError, match=r"--cache-steps all: expected a count as in 3, steps as in 0,3,7, or uniform"):
        read_config(options | {"cache_steps": "all"}, preset=None, dense=True)


def test_timesteps_of_the_solver_are_read() -> None:
    options = dict.fromkeys(CompileConfig().to_json()) | {"solver": "dpm++", "solver_timesteps": "90, 45,10"}
    assert read_config(options, preset="l22-t56", dense=False).solver_timesteps == (90, 45, 10)
    with pytest.raises(ValueError, match=r"--solver-timesteps 3.5: expected descending timesteps from 99 to 0"):
        read_config(options | {"solver_timesteps": "3.5"}, preset=None, dense=True)


def test_options_that_decide_something_pass() -> None:
    options = dict.fromkeys(CompileConfig().to_json())
    given = options | {"visual_tokens": "20", "key_tokens": "9", "keep_layers": "3", "layer_rule": "greedy"}
    given["token_rule"] = "relevance"
    config = read_config(given, preset=None, dense=True)
    assert (config.visual_tokens, config.key_tokens, config.keep_layers) == (20, 9, 3)
    drawn = read_config(
        options | {"token_rule": "random", "token_seed": 4, "merge_tokens": True}, preset="l22-t56", dense=False
    )
    assert (drawn.token_rule, drawn.token_seed, drawn.merge_tokens) == ("random", 4, True)


def test_what_was_not_measured_says_how_to_measure_it(capsys: pytest.CaptureFixture[str]) -> None:
    size = GraphStats(ops=1, flops=2, paper_flops=2, weight_bytes=4)
    passes = (PassReport(name="FoldConstants", exact=True, changes=0, before=size, after=size),)
    report = CompileReport(config=CompileConfig(), passes=passes, deviations=())
    new_console().print(compile_summary(report))
    shown = " ".join(capsys.readouterr().out.split())
    assert "not measured. --calibration FRAMES measures it, beside --plan too." in shown
    assert "not measured; give calibration frames, beside a plan too" in str(report)


@pytest.mark.parametrize(
    ("arguments", "expected", "missing"),
    [
        (("--batch-size", "2"), ("evla verify", "takes 2 at a time", "predict_action(frames"), "evla run DIR"),
        (("--batch-size", "1"), ("evla verify", "evla run DIR", "--unnorm-key a"), "predict_action"),
    ],
)
def test_the_last_lines_of_compile_work_for_its_batch(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, expected: Any, missing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    size = GraphStats(ops=1, flops=2, paper_flops=2, weight_bytes=4)
    passes = (PassReport(name="FoldConstants", exact=True, changes=0, before=size, after=size),)
    report = CompileReport(config=CompileConfig(), passes=passes, deviations=())
    policy = SimpleNamespace(processor=SimpleNamespace(statistics={"a": None, "b": None}))
    compiled = SimpleNamespace(report=report, export=lambda *_, **__: None)
    monkeypatch.setattr(evla_compile, "load", lambda *_, **__: policy, raising=False)
    monkeypatch.setattr(evla_compile, "compile", lambda *_, **__: compiled, raising=False)
    outcome = evla("compile", tiny_checkpoint, "--out", "DIR", "--dense", "--no-verify", *arguments)
    assert not outcome.status, outcome.err
    assert all(words in outcome.words for words in expected), outcome.words
    assert missing not in outcome.words


def test_the_next_steps_keep_the_framing(capsys: pytest.CaptureFixture[str]) -> None:
    print_next(Path("DIR"), (), framing="deploy")
    print_next(Path("DIR"), (), batch_size=2, framing="deploy")
    one, several = capsys.readouterr().out.split("Written to")[1:]
    assert "--framing deploy" in one
    assert "framing='deploy')" in several


def test_a_framing_without_frames_is_refused(tmp_path: Path) -> None:
    message = refused(evla("compile", tmp_path, "--out", tmp_path / "out", "--dense", "--framing", "deploy"))
    assert "--framing deploy is for the frames of --calibration, and none are given" in message


def test_what_follows_a_bfloat16_export_works_on_a_cpu_and_keeps_its_precision(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_next(Path("policy"), ("toy",), precision="bfloat16")
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "  evla verify policy",
        "  evla run policy --image FRAME.png --instruction 'pick up the apple'",
        "on a CPU in float32 arithmetic; an engine computes in bfloat16:",
        "  evla build policy",
    ]
    print_next(Path("policy"), ("toy",))
    assert "float32" not in capsys.readouterr().out

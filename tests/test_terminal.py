"""What reaches a terminal: texts of others without their control characters, and outputs that are closed or full."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from evla_compile import cli
from evla_compile.artifact.manifest import write_manifest
from evla_compile.cli.console import new_table, print_json
from evla_compile.terminal import in_one_line, new_console, printable
from tests.cli.command_line import Outcome, evla, example_manifest, refused

ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def run(manifest: Path, **streams: Any) -> "subprocess.CompletedProcess[str]":
    """Show a manifest in a process of its own."""
    command = [sys.executable, "-m", "evla_compile", "inspect", str(manifest)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **streams)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    write_manifest(example_manifest(), tmp_path / "manifest.json")
    return tmp_path / "manifest.json"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("red \x1b[31m", r"red \x1b[31m"),
        ("\r\x08\x7f\x9b", r"\r\x08\x7f\x9b"),
        ("right \u202e left", r"right \u202e left"),
        ("a\u2028b\ufeff", r"a\u2028b\ufeff"),
        ("lone \ud800", r"lone \ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("ramasse la pomme \u00e9 \u4e2d \U0001f916", "ramasse la pomme \u00e9 \u4e2d \U0001f916"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
    ],
)
def test_what_steers_a_terminal_becomes_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_name_cannot_pass_for_a_line() -> None:
    assert in_one_line("toy\nverified:\tall") == r"toy\nverified:\tall"


def test_inspect_shows_a_hostile_manifest_harmlessly(tmp_path: Path) -> None:
    manifest = example_manifest(dataset=f"toy{ESCAPE}\nverified: all", versions=f"2\u202e{ESCAPE}").to_json()
    # Written by hand: a lone surrogate is an escape in JSON, and text in no encoding.
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(manifest | {"created_by": "0.0.0\udcff"}), encoding="ascii")
    outcome = evla("inspect", file, columns=120)
    assert not outcome.status, outcome.err
    assert not [char for char in outcome.out if not (char.isprintable() or char == "\n")]
    for shown in (r"toy\x1b[2J\x1b]0;owned\x07\nverified: all", r"2\u202e\x1b[2J", r"evla_compile 0.0.0\udcff"):
        assert shown in outcome.words


def test_a_console_escapes_whatever_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table(f"title {ESCAPE}", "column")
    table.add_row(Text(f"cell {ESCAPE}"))
    new_console().print(Text(f"text {ESCAPE}"), table, f"words {ESCAPE}")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.count(r"\x1b[2J") == 4


def test_errors_and_usage_show_control_characters_as_escapes(tmp_path: Path) -> None:
    assert r"none\x1b[2J" in refused(evla("verify", tmp_path / f"none{ESCAPE}", columns=200))
    for arguments, shown in (((f"fly{ESCAPE}",), r"fly\x1b[2J"), (("run", "x", f"--{ESCAPE}"), r"--\x1b[2J")):
        usage = evla(*arguments, columns=200)
        assert usage.status == 2
        assert "\x1b" not in usage.err
        assert shown in usage.err.replace("\\\\", "\\")


def test_a_surrogate_in_a_manifest_prints_where_the_encoding_is_narrow(tmp_path: Path) -> None:
    manifest = example_manifest().to_json() | {"created_by": "\ud800 \u00e9"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="ascii")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    shown = run(tmp_path / "manifest.json", stdout=subprocess.PIPE, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert r"\ud800 \xe9" in shown.stdout


def test_a_reader_that_has_gone_ends_the_command_without_a_word(manifest: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = run(manifest, stdout=writing)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_closed_standard_output_is_an_error_before_any_work(manifest: Path) -> None:
    ended = run(manifest, preexec_fn=lambda: os.close(1))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: standard output is closed: expected a terminal, a file or a pipe")


def test_a_closed_standard_error_stops_nothing(manifest: Path) -> None:
    command = [sys.executable, "-m", "evla_compile", "inspect", str(manifest)]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=lambda: os.close(2))
    assert "made by" in shown.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_an_output_without_room_is_one_error(manifest: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = run(manifest, stdout=full)
    assert ended.returncode == 2
    assert ended.stderr == "error: [Errno 28] No space left on device\n"


def test_json_is_ascii_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def printing(value: object) -> Outcome:
        def app(**_: str) -> None:
            print_json(value)
            raise SystemExit

        monkeypatch.setattr(cli, "app", app)
        return evla()

    outcome = printing({"name": "\x1b\x7f\u00e9" + 200 * "x"})
    assert outcome.out == f'{{"name": "\\u001b\\u007f\\u00e9{200 * "x"}"}}\n'
    assert "which JSON cannot hold" in refused(printing([float("inf")]))

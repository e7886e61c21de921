"""`evla fidelity` on the tiny golden model: recording, comparing, its exit status, and every bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.fidelity.chunks import ActionChunks
from tests.cli.command_line import Outcome, evla, refused

INSTRUCTION, KEY = "pick up the apple", "bridge_orig"
BUDGETS = ("--preset", "l22-t56", "--visual-tokens", "0.22", "--cache-interval", "2", "--ddim-steps", "2")


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory, frame: Image.Image) -> Path:
    """Three frames of two episodes."""
    folder = tmp_path_factory.mktemp("frames")
    lines = []
    for number, episode in enumerate(("first", "first", "second")):
        frame.rotate(90 * number).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "instruction": INSTRUCTION, "episode": episode}))
    (folder / "frames.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, frames: Path) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "artifact"
    outcome = evla("compile", tiny_checkpoint, "--calibration", frames, "--out", out, "--no-verify", *BUDGETS)
    assert not outcome.status, outcome.err
    assert "fidelity: " in outcome.words
    assert "how to read it" in outcome.words
    return out


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, frames: Path) -> tuple[Path, Outcome]:
    file = tmp_path_factory.mktemp("recorded") / "dense.npz"
    return file, evla("fidelity", tiny_checkpoint, "--frames", frames, "--record", file)


def measured(*arguments: object) -> dict[str, object]:
    outcome = evla("fidelity", *arguments, "--unnorm-key", KEY, "--json")
    assert not outcome.status, outcome.err
    found: dict[str, object] = json.loads(outcome.out)
    return found


def test_the_dense_policy_is_recorded(recorded: tuple[Path, Outcome], tiny_policy: CogACT) -> None:
    file, outcome = recorded
    assert not outcome.status
    assert f"wrote {file}" in outcome.message
    action = tiny_policy.sizes.action
    assert ActionChunks.load(file).samples.shape == (2, 3, action.chunk, action.action_width)


def test_a_record_is_as_good_as_the_policy(
    artifact: Path, recorded: tuple[Path, Outcome], tiny_checkpoint: Path, frames: Path, tmp_path: Path
) -> None:
    by_record = measured(artifact, recorded[0], "--frames", frames)
    assert measured(artifact, tiny_checkpoint, "--frames", frames, "--record", tmp_path / "again.npz") == by_record
    np.testing.assert_array_equal(
        ActionChunks.load(tmp_path / "again.npz").samples, ActionChunks.load(recorded[0]).samples
    )
    assert (by_record["frames"], by_record["draws"]) == (3, 2)


def test_an_artifact_is_nowhere_from_itself(artifact: Path, frames: Path) -> None:
    assert measured(artifact, artifact, "--frames", frames)["drift"] == 0.0


def test_the_tables_are_printed(artifact: Path, recorded: tuple[Path, Outcome], frames: Path) -> None:
    outcome = evla(
        "fidelity", artifact, recorded[0], "--frames", frames, "--unnorm-key", KEY, "--horizon", 4, columns=120
    )
    assert not outcome.status
    for text in (
        "own noise",
        "gripper flips",
        "roll, degrees",
        "Farthest 2 of 2 episodes",
        "1 of 1 instructions",
        "fidelity: ",
        "in 4 actions",
    ):
        assert text in outcome.out, text


def test_a_bound_decides_the_exit_status(artifact: Path, recorded: tuple[Path, Outcome], frames: Path) -> None:
    drift = measured(artifact, recorded[0], "--frames", frames)["drift"]
    assert isinstance(drift, float)
    outcomes = [
        evla("fidelity", artifact, recorded[0], "--frames", frames, "--unnorm-key", KEY, "--max", factor * drift)
        for factor in (1.01, 0.99)
    ]
    assert [outcome.status for outcome in outcomes] == [0, 1]
    assert f"a drift of {drift:.2f} mm is above --max" in outcomes[1].message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{artifact}", "--frames", "{frames}"), "a second policy to compare with, or --record"),
        (("{artifact}", "--frames", "{frames}", "--record", "{new}/x.json"), "ends in .npz"),
        (("{artifact}", "--frames", "{frames}", "--record", "{new}/x.npz", "--json"), "there is no second policy"),
        (("{artifact}", "{record}", "--frames", "{new}"), "no source of frames"),
        (("{artifact}", "{record}", "--frames", "{frames}"), "expected one of bridge_orig, fractal20220817_data"),
        (("{artifact}", "{record}", "--frames", "{frames}", "--unnorm-key", "x"), "bridge_orig"),
        (("{artifact}", "{record}", "--frames", "{frames}", "--unnorm-key", KEY, "--horizon", 99), "from 1 to"),
        (("{artifact}", "{record}", "--frames", "{fewer}", "--unnorm-key", KEY), "run both on the same frames"),
        (("{artifact}", "{record}", "--frames", "{frames}", "--unnorm-key", KEY, "--draws", 3), "--draws 2 or fewer"),
        (("{record}", "{record}", "--frames", "{frames}"), "both are recorded"),
        (("{artifact}", "{broken}", "--frames", "{frames}", "--unnorm-key", KEY), "cannot be read"),
        (("{new}", "{record}", "--frames", "{frames}", "--unnorm-key", KEY), "manifest"),
        (("{artifact}", "{record}", "--frames", "{frames}", "--draws", 65, "--unnorm-key", KEY), "from 1 to 64"),
    ],
)
def test_bad_input_is_one_error(
    arguments: tuple[str, ...],
    message: str,
    artifact: Path,
    recorded: tuple[Path, Outcome],
    frames: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    shutil.copytree(frames, tmp_path / "fewer")
    lines = (frames / "frames.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "fewer" / "frames.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    places = {
        "artifact": artifact,
        "record": recorded[0],
        "frames": frames,
        "new": tmp_path / "new",
        "fewer": tmp_path / "fewer",
        "broken": tmp_path / "broken.npz",
    }
    assert message in refused(evla("fidelity", *(str(each).format(**places) for each in arguments), columns=400))

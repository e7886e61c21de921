"""`evla run` on many frames: where they come from, noise, threads, and the file of actions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from evla_compile import runtime
from evla_compile.host.camera_frame import CameraFrame
from evla_compile.runtime.latency import LatencyCounter
from evla_compile.settings.config import CompileConfig
from tests.cli.command_line import Outcome, evla, refused

CHUNK = (2, 7)


class FakePolicy:
    """Answers with the brightness of the frame, or with the noise, and remembers its calls."""

    def __init__(self) -> None:
        self.config, self.latency = CompileConfig(), LatencyCounter()
        self.instructions: list[str] = []
        self.threads: int | None = None

    def predict_action(
        self, image: CameraFrame, instruction: str, _: str | None, *, noise: NDArray[np.floating] | None, **__: Any
    ) -> NDArray[np.float64]:
        self.instructions.append(instruction)
        brightness = float(np.asarray(image).mean())
        return np.full(CHUNK, brightness) if noise is None else noise.astype(np.float64)


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> FakePolicy:
    fake = FakePolicy()

    def load(_: Path, __: str | None, threads: int | None, **___: Any) -> FakePolicy:
        fake.threads = threads
        return fake

    monkeypatch.setattr(runtime, "load", load)
    return fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two frames, of brightness 3 and 9, with a listing that has them the other way round."""
    (tmp_path / "shots").mkdir()
    for name, brightness in (("a.png", 3), ("b.png", 9)):
        Image.new("RGB", (4, 4), (brightness,) * 3).save(tmp_path / "shots" / name)
    lines = [{"image": "b.png", "instruction": "open"}, {"image": "a.png", "instruction": "close"}]
    (tmp_path / "shots" / "frames.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return tmp_path / "shots"


@pytest.fixture
def run(policy: FakePolicy) -> Callable[..., Outcome]:
    return lambda *arguments: evla("run", "policy", *arguments)


def test_a_folder_of_images_shares_an_instruction(
    run: Callable[..., Outcome], policy: FakePolicy, folder: Path, tmp_path: Path
) -> None:
    outcome = run("--image", folder, "--instruction", "go", "--threads", 3, "--out", tmp_path / "actions.npy")
    assert not outcome.status, outcome.err
    assert (policy.threads, policy.instructions) == (3, ["go", "go"])
    actions = np.load(tmp_path / "actions.npy")
    assert (actions.dtype, actions.shape) == (np.float64, (2, *CHUNK))
    assert actions[:, 0, 0].tolist() == [3.0, 9.0]
    assert f"wrote {tmp_path / 'actions.npy'}: actions [2, 2, 7], a chunk a frame" in outcome.words


def test_a_listing_has_its_own_instructions(run: Callable[..., Outcome], policy: FakePolicy, folder: Path) -> None:
    found = json.loads(run("--frames", folder, "--json", "--repeat", 2).out)["frames"]
    assert policy.instructions == ["open", "open", "close", "close"]
    assert [(Path(frame["image"]).name, frame["instruction"], frame["actions"][0][0]) for frame in found] == [
        ("b.png", "open", 9.0),
        ("a.png", "close", 3.0),
    ]


def test_tables_name_their_frames(run: Callable[..., Outcome], folder: Path) -> None:
    words = run("--frames", folder / "frames.jsonl").words
    assert words.count("step dx dy dz") == 2
    assert 'Actions for "close" on' in words


def test_a_greyscale_file_is_converted_on_request(run: Callable[..., Outcome], tmp_path: Path) -> None:
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    arguments = ("--image", tmp_path / "grey.png", "--instruction", "go", "--json")
    assert "--convert" in refused(run(*arguments))
    assert json.loads(run(*arguments, "--convert").out)["actions"][0][0] == 7.0


@pytest.mark.parametrize("rank", [2, 3])
def test_noise_comes_from_a_file(run: Callable[..., Outcome], folder: Path, tmp_path: Path, rank: int) -> None:
    noise = np.arange(28, dtype=np.float32).reshape(2, *CHUNK)
    np.save(tmp_path / "noise.npy", noise if rank == 3 else noise[0])
    found = json.loads(run("--frames", folder, "--noise", tmp_path / "noise.npy", "--json").out)["frames"]
    assert [frame["actions"][0][0] for frame in found] == [0.0, 14.0 if rank == 3 else 0.0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "expected either --image FILE|DIR with --instruction, or --frames FRAMES"),
        (("--image", "{0}", "--frames", "{0}"), "expected either --image FILE|DIR"),
        (("--image", "{0}"), "--image without --instruction"),
        (("--frames", "{0}", "--instruction", "go"), "--instruction beside --frames"),
        (("--frames", "{0}", "--noise", "{0}/a.png"), "expected .npy, float [A,7] or [N,A,7]"),
        (("--frames", "{0}", "--noise", "{0}/three.npy"), "has noise for 3 frames: expected 2, or [A,7] for all"),
        (("--frames", "{0}", "--noise", "{0}/flat.npy"), "holds shape [7]"),
        (("--frames", "{0}", "--out", "{0}/actions.csv"), "expected a file that ends in .npy"),
        (("--frames", "{0}", "--out", "{0}/none/actions.npy"), "in a folder that exists"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_policy_is_loaded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, arguments: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr(runtime, "load", lambda *_, **__: pytest.fail("the policy was loaded before the refusal"))
    np.save(folder / "three.npy", np.zeros((3, *CHUNK), dtype=np.float32))
    np.save(folder / "flat.npy", np.zeros(7, dtype=np.float32))
    outcome = evla("run", "policy", *(argument.format(folder) for argument in arguments), columns=500)
    assert expected in refused(outcome)

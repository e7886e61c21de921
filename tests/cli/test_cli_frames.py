"""`evla frames`, and recordings where other commands take frames."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evla_compile
from evla_compile import runtime
from evla_compile.cli import recording_options
from evla_compile.host.frames import Frame, read_frames
from evla_compile.recordings.contact_sheet import CELL
from evla_compile.recordings.selection import Selection
from evla_compile.runtime.latency import LatencyCounter
from evla_compile.settings.config import CompileConfig
from tests.cli.command_line import evla, refused
from tests.recordings.written import LENGTHS, TASKS, TOP, WRIST, assert_shows, raw_bag, source_frame, write_v3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v3(tmp_path_factory.mktemp("recordings") / "dataset", cameras=(TOP, WRIST))


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return raw_bag(tmp_path_factory.mktemp("recordings") / "pick.mcap")


def test_frames_writes_a_folder_that_calibration_reads(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "my frames"
    outcome = evla("frames", dataset, "--out", out, "--camera", TOP, "--every", 3)
    assert not outcome.status, outcome.err
    frames = read_frames(out)
    places = [(0, 0), (0, 3), (1, 0), (1, 3), (1, 6)]
    for frame, (episode, number) in zip(frames, places, strict=True):
        assert_shows(frame.image, source_frame(episode, number))
        assert (frame.instruction, frame.episode) == (TASKS[episode], str(episode))
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.size == (5 * CELL[0], CELL[1])
    assert f"LeRobotDataset v3.0, {TOP}" in outcome.words
    assert "close the [red] drawer 3 1" in outcome.words
    assert f"Written to {out}: 5 frames" in outcome.words
    assert f"evla compile RUN_DIR --calibration '{out}' --out ARTIFACT" in outcome.words


def test_frames_of_chosen_episodes(dataset: Path, tmp_path: Path) -> None:
    chosen = ("--camera", WRIST, "--episodes", "1", "--instruction", "do it")
    assert not evla("frames", dataset, "--out", tmp_path / "frames", *chosen).status
    frames = read_frames(tmp_path / "frames")
    assert [(frame.instruction, frame.episode) for frame in frames] == [("do it", "1")] * LENGTHS[1]
    assert_shows(frames[8].image, source_frame(1, 8, wrist=True))


def test_frames_of_a_bag(bag: Path, tmp_path: Path) -> None:
    outcome = evla("frames", bag, "--out", tmp_path / "frames", "--instruction", "pick it")
    assert not outcome.status, outcome.err
    assert [frame.episode for frame in read_frames(tmp_path / "frames")] == ["pick"] * LENGTHS[0]
    assert "MCAP bag, /camera/image_raw" in outcome.words


def test_many_instructions_are_summed_up(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    lines = [json.dumps({"image": "0.png", "instruction": f"task {i}", "episode": i % 3}) for i in range(35)]
    (tmp_path / "frames.jsonl").write_text("\n".join(lines), encoding="utf-8")
    table = evla_compile.cli.frames.instruction_table(tmp_path, "frames")
    assert table.row_count == 31
    assert [list(column.cells)[-1] for column in table.columns] == ["5 more", "5", "3"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), f"2 colour cameras, '{TOP}', '{WRIST}': choose one with --camera"),
        (("--camera", "front"), "has no camera 'front': expected one of its cameras"),
        (("--camera", TOP, "--episodes", "1-9"), "has no episode 2: it has 2 episodes, 0 to 1"),
        (("--camera", TOP, "--episodes", "all"), "--episodes: episodes 'all': expected indices"),
        (("--camera", TOP, "--instruction", " "), "instruction=' '"),
    ],
)
def test_frames_refuses_and_leaves_nothing(
    dataset: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(evla("frames", dataset, "--out", tmp_path / "frames", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_frames_that_cannot_be_decoded_leave_nothing(dataset: Path, tmp_path: Path) -> None:
    folder = write_v3(tmp_path / "dataset")
    video = folder / f"videos/{TOP}/chunk-000/file-000.mp4"
    video.write_bytes(video.read_bytes()[:1000])
    assert "cannot be decoded" in refused(evla("frames", folder, "--out", tmp_path / "frames"))
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_frames_refuses_a_full_folder_before_any_work(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    message = refused(evla("frames", dataset / "no such", "--out", tmp_path))
    assert f"{tmp_path} is not empty: expected a new or empty folder" in message


def test_frames_refuses_what_is_no_recording(tmp_path: Path) -> None:
    message = refused(evla("frames", tmp_path / "none", "--out", tmp_path / "frames"))
    assert f"{tmp_path / 'none'} does not exist: expected a LeRobotDataset's folder" in message


def test_a_missing_extra_is_one_message(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    message = refused(evla("frames", dataset, "--out", tmp_path / "frames", "--camera", TOP))
    assert 'pip install "evla-compile[datasets]"' in message


def test_frames_imports_no_torch_and_no_library_that_it_does_not_need(bag: Path, tmp_path: Path) -> None:
    arguments = ["frames", str(bag), "--out", str(tmp_path / "frames"), "--instruction", "pick it"]
    code = (
        "import sys\n"
        "from evla_compile.cli import main\n"
        f"sys.argv = ['evla', *{arguments!r}]\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in ('torch', 'pyarrow', 'av', 'transformers') if name in sys.modules])\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"


def test_sigterm_leaves_nothing(bag: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from evla_compile.cli import main\n"
        "from evla_compile.recordings.frames_folder import FramesWriter\n"
        "FramesWriter.add = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv = ['evla', 'frames', {str(bag)!r}, '--out', {str(tmp_path / 'frames')!r}, '--instruction', 'go']\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[Frame]:
    """The frames that `evla compile` calibrates on; compilation itself is left out."""
    given: list[Frame] = []

    def compile_policy(*_: object, calibration: list[Frame], **__: object) -> None:
        given.extend(calibration)
        raise KeyboardInterrupt

    processor = SimpleNamespace(text=lambda *_: None, statistics={})
    monkeypatch.setattr(evla_compile, "load", lambda *_, **__: SimpleNamespace(processor=processor), raising=False)
    monkeypatch.setattr(evla_compile, "compile", compile_policy, raising=False)
    return given


def test_compile_calibrates_on_a_dataset(
    tiny_checkpoint: Path, dataset: Path, tmp_path: Path, calibrated: list[Frame]
) -> None:
    chosen = ("--camera", TOP, "--every", 4, "--episodes", "1")
    outcome = evla("compile", tiny_checkpoint, "--out", tmp_path / "out", "--calibration", dataset, *chosen)
    assert outcome.status == 130, outcome.err
    assert f"decode 3 frames of {TOP} of the LeRobotDataset v3.0" in outcome.message
    for frame, number in zip(calibrated, (0, 4, 8), strict=True):
        assert_shows(frame.image, source_frame(1, number))
        assert (frame.instruction, frame.episode) == (TASKS[1], "1")


def test_compile_calibrates_on_a_bag(tiny_checkpoint: Path, bag: Path, tmp_path: Path, calibrated: list[Frame]) -> None:
    chosen = ("--calibration", bag, "--instruction", "pick it")
    assert evla("compile", tiny_checkpoint, "--out", tmp_path / "out", *chosen).status == 130
    assert [(frame.instruction, frame.episode) for frame in calibrated] == [("pick it", "pick")] * LENGTHS[0]


def test_options_for_recordings_need_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    alone = evla("compile", tiny_checkpoint, "--out", tmp_path / "out", "--dense", "--every", 2)
    assert "--every: for a LeRobotDataset or a bag, and --calibration is not given; leave it out" in refused(alone)
    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "frames.jsonl").write_text('{"image": "0.png", "instruction": "go"}', encoding="utf-8")
    chosen = ("--camera", "top", "--episodes", "0", "--instruction", "go")
    listed = evla("compile", tiny_checkpoint, "--out", tmp_path / "out", "--calibration", frames, *chosen)
    assert "--camera, --episodes, --instruction: for a LeRobotDataset or a bag, and" in refused(listed)
    run = evla("run", "policy", "--image", frames, "--instruction", "go", "--camera", "top")
    assert "--camera: for a LeRobotDataset or a bag, and --image or --frames names no such recording" in refused(run)


def test_run_takes_the_frames_of_a_recording(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, str]] = []

    def predict(image: Any, instruction: str, *_: object, **__: object) -> Any:
        seen.append((image, instruction))
        return np.zeros((2, 7))

    policy = SimpleNamespace(config=CompileConfig(), latency=LatencyCounter(), predict_action=predict)
    monkeypatch.setattr(runtime, "load", lambda *_, **__: policy)
    outcome = evla("run", "policy", "--frames", dataset, "--camera", TOP, "--every", 5, "--json")
    assert not outcome.status, outcome.err
    shown = json.loads(outcome.out)["frames"]
    assert shown[2]["image"] == f"frame 2 of {dataset}, episode 1"
    assert [frame["instruction"] for frame in shown] == [TASKS[0], TASKS[0], TASKS[1], TASKS[1]]
    for (image, _), place in zip(seen, ((0, 0), (0, 5), (1, 0), (1, 5)), strict=True):
        assert_shows(image, source_frame(*place))


def test_a_folder_that_is_no_source_says_what_is_one(tmp_path: Path) -> None:
    with pytest.raises(evla_compile.CalibrationError, match=r"is no source of frames: expected a folder with frames"):
        recording_options.read_source(tmp_path, Selection(), convert=False)

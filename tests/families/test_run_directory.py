from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from evla_compile.errors import CheckpointError, UnsupportedModelError
from evla_compile.families.cogact.loading import run_directory
from evla_compile.families.cogact.loading.run_directory import (
    find_checkpoint,
    find_tokenizer,
    naming,
    read_json,
    read_text,
)

Hub = Callable[[Path | Exception], list[tuple[str, list[str]]]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Stand in for the hub: answers every download with a folder or an error, and records what was asked for."""

    def answer_with(answer: Path | Exception) -> list[tuple[str, list[str]]]:
        asked: list[tuple[str, list[str]]] = []

        def download(repository: str, *, allow_patterns: list[str]) -> str:
            asked.append((repository, allow_patterns))
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(run_directory, "snapshot_download", download)
        return asked

    return answer_with


def make_run(folder: Path, *names: str) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    for name in names:
        (folder / "checkpoints" / name).touch()
    return folder


def test_a_run_directory_gives_its_only_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "a.pt", "a.optimizer")
    assert find_checkpoint(run) == run / "checkpoints" / "a.pt"


@pytest.mark.parametrize("names", [(), ("a.pt", "b.pt")])
def test_a_run_directory_needs_exactly_one_checkpoint(tmp_path: Path, names: tuple[str, ...]) -> None:
    run = make_run(tmp_path / "run", *names)
    with pytest.raises(CheckpointError, match=rf"run: expected exactly one .*\.pt, found {len(names)}") as caught:
        find_checkpoint(run)
    assert all(name in str(caught.value) for name in names)


def test_a_relative_path_to_a_checkpoint_keeps_its_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", "a.pt")
    monkeypatch.chdir(run / "checkpoints")
    assert find_checkpoint("a.pt").parent.parent == run


def test_a_linked_checkpoint_keeps_the_run_directory_of_the_link(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "blob").touch()
    (run / "checkpoints" / "a.pt").symlink_to(tmp_path / "blob")
    assert find_checkpoint(run / "checkpoints" / "a.pt").parent.parent == run


@pytest.mark.parametrize("name", ["elsewhere/a.pt", "checkpoints/a.txt"])
def test_a_file_outside_the_layout_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir()
    file.touch()
    with pytest.raises(CheckpointError, match=r"expected a \.pt file in a folder named checkpoints"):
        find_checkpoint(file)


@pytest.mark.parametrize(
    "names", [("model.safetensors",), ("model-1.safetensors", "model-2.safetensors"), ("checkpoints/a.safetensors",)]
)
def test_weights_in_another_format_are_named_with_what_to_do(tmp_path: Path, names: tuple[str, ...]) -> None:
    run = make_run(tmp_path / "run")
    for name in names:
        (run / name).touch()
    more = rf" and {len(names) - 1} more" if len(names) > 1 else ""
    with pytest.raises(CheckpointError, match=rf"found 0, but {names[0]}{more}: safetensors.*not read.*torch\.save"):
        find_checkpoint(run)
    with pytest.raises(CheckpointError, match=rf"{names[0]}: safetensors.*not read.*torch\.save"):
        find_checkpoint(run / names[0])


def test_a_checkpoint_beside_its_folder_is_to_be_moved(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "a.pt").touch()
    with pytest.raises(CheckpointError, match=r"found 0, but a\.pt beside that folder; move it into checkpoints"):
        find_checkpoint(run)


@pytest.mark.parametrize(
    ("path", "meant", "on_hub"),
    [
        ("runs/cogact-bse", "runs/cogact-base", True),  # it might be an id as well
        ("./runs/cogact-base/checkpoints/b.pt", "runs/cogact-base/checkpoints/a.pt", False),
        ("runz", "runs", False),
    ],
)
def test_a_mistyped_path_is_answered_as_a_path_and_with_what_it_resembles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, path: str, meant: str, on_hub: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "cogact-base", "a.pt")
    asked = hub(LocalEntryNotFoundError("offline"))
    with pytest.raises(CheckpointError, match=r"no such ") as caught:
        find_checkpoint(path)
    assert f"(is {tmp_path / meant} meant?)" in str(caught.value)
    assert ("Hugging Face hub (offline)" in str(caught.value)) == bool(asked) == on_hub


@pytest.mark.parametrize("path", ["nowhere", "no/where/at/all", "../nowhere", "runs/model.pt", ""])
def test_a_missing_path_that_is_no_hub_id_never_reaches_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = hub(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such file or folder|exactly one"):
        find_checkpoint(path)
    assert not asked


def test_a_hub_id_downloads_the_json_files_and_the_checkpoint(tmp_path: Path, hub: Hub) -> None:
    run = make_run(tmp_path / "snapshot", "CogACT-Base.pt")
    asked = hub(run)
    assert find_checkpoint("CogACT/CogACT-Base") == run / "checkpoints" / "CogACT-Base.pt"
    assert asked == [("CogACT/CogACT-Base", ["*.json", "checkpoints/*.pt"])]


def test_a_local_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    run = make_run(tmp_path / "CogACT" / "CogACT-Base", "local.pt")
    monkeypatch.chdir(tmp_path)
    asked = hub(tmp_path)
    assert find_checkpoint("CogACT/CogACT-Base") == run / "checkpoints" / "local.pt"
    assert not asked


TRANSPORT_ERROR = HfHubHTTPError.__bases__[0]


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("offline"), TRANSPORT_ERROR("reset"), HFValidationError("bad id"), OSError("disk full")],
)
def test_a_hub_that_fails_is_named_with_its_reason_and_a_way_out(hub: Hub, error: Exception) -> None:
    hub(error)
    with pytest.raises(CheckpointError, match=rf"CogACT/CogACT-Base: .*\({error}\).*give its folder"):
        find_checkpoint("CogACT/CogACT-Base")


def test_a_tokenizer_is_taken_from_the_argument_then_the_run_directory_then_the_hub(tmp_path: Path, hub: Hub) -> None:
    run, given, snapshot = tmp_path / "run", tmp_path / "given", tmp_path / "snapshot"
    asked = hub(snapshot)
    for folder in (run, given):
        folder.mkdir()
        (folder / "tokenizer.json").touch()
    assert find_tokenizer(given, run) == given / "tokenizer.json"
    assert find_tokenizer(str(given / "tokenizer.json"), run) == given / "tokenizer.json"
    assert find_tokenizer(None, run) == run / "tokenizer.json"
    assert not asked
    assert find_tokenizer(None, tmp_path) == snapshot / "tokenizer.json"
    assert asked == [("openvla/openvla-7b", ["tokenizer.json"])]


@pytest.mark.parametrize("name", ["", "missing.json"])
def test_a_tokenizer_argument_without_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").touch()
    with pytest.raises(CheckpointError, match=r"tokenizer='.*': expected a tokenizer\.json or its folder"):
        find_tokenizer(tmp_path / name, tmp_path / "run")


def test_an_unreachable_tokenizer_names_the_argument_that_replaces_it(tmp_path: Path, hub: Hub) -> None:
    hub(LocalEntryNotFoundError("offline"))
    with pytest.raises(CheckpointError, match=r"openvla/openvla-7b: .*\(offline\).* the argument `tokenizer`"):
        find_tokenizer(None, tmp_path)


def test_json_is_read_as_an_object(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"name": "é"}', encoding="utf-8")
    assert read_json(file) == {"name": "é"}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "expected this file of a CogACT run directory, found none"),
        (b"\xff\xfe", "expected UTF-8 text"),
        (b'{"cut":', "expected a JSON object"),
        (b"[1]", "expected a JSON object, found a list"),
    ],
)
def test_unreadable_json_is_refused_by_its_file_name(tmp_path: Path, contents: bytes | None, message: str) -> None:
    file = tmp_path / "config.json"
    if contents is not None:
        file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        read_json(file)


def test_a_folder_in_place_of_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected UTF-8 text"):
        read_text(tmp_path)


@pytest.mark.parametrize("kind", [CheckpointError, UnsupportedModelError])
def test_naming_puts_the_file_in_front_and_keeps_the_kind_of_error(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^a\.pt: broken$"), naming(Path("a.pt")):
        raise kind("broken")

"""Which files a build of engines replaces, with a stand-in for the builder."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evla_compile.artifact.files import ArtifactFiles, check_files, find_manifest
from evla_compile.artifact.manifest import Manifest, read_manifest, write_manifest
from evla_compile.errors import ArtifactError
from evla_compile.exporters import build
from tests.artifact.killed_writers import build_engine, contents, export


@pytest.fixture(params=["policy", "policy.onnx"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    target = tmp_path / str(request.param)
    export(target, "old")
    return target


def engine_of(target: Path) -> Path:
    files = ArtifactFiles.of(target)
    return files.folder / files.engine


def test_an_engine_that_the_manifest_describes_is_replaced(target: Path) -> None:
    build_engine(target, "old")
    before = contents(target.parent)
    build_engine(target, "new")
    after = contents(target.parent)
    assert after.keys() == before.keys()
    assert engine_of(target).read_text(encoding="utf-8") == "new engine"
    check_files(read_manifest(find_manifest(target)).files, ArtifactFiles.of(target).folder)


@pytest.mark.parametrize("listed", [False, True])
def test_an_engine_of_somebody_else_is_refused_before_the_build(
    target: Path, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if listed:
        build_engine(target, "old")
    engine_of(target).write_text("mine", encoding="utf-8")
    before = contents(target.parent)
    monkeypatch.setattr(build, "check_memory", lambda *arguments: pytest.fail("the work must not start"))
    with pytest.raises(ArtifactError, match=rf"{engine_of(target)} would be replaced, and is not the engine that"):
        build_engine(target, "new")
    assert contents(target.parent) == before


def test_a_link_that_leads_nowhere_is_somebody_else_s_too(target: Path) -> None:
    engine_of(target).symlink_to("/nonexistent/engine")
    with pytest.raises(ArtifactError, match="would be replaced, and is not the engine"):
        build_engine(target, "new")
    assert engine_of(target).is_symlink()


def test_an_engine_that_appears_during_the_build_is_not_replaced(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = build._check_space

    def put_one_there(manifest: Manifest, place: Path) -> None:
        measure(manifest, place)
        engine_of(target).write_text("mine", encoding="utf-8")

    monkeypatch.setattr(build, "_check_space", put_one_there)
    with pytest.raises(ArtifactError, match="would be replaced, and is not the engine"):
        build_engine(target, "new")
    assert engine_of(target).read_text(encoding="utf-8") == "mine"
    assert read_manifest(find_manifest(target)).engine is None


def test_a_manifest_that_is_replaced_during_the_build_keeps_its_artifact(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = build._check_space

    def export_again(manifest: Manifest, place: Path) -> None:
        measure(manifest, place)
        write_manifest(replace(manifest, pad_id=4), place)

    monkeypatch.setattr(build, "_check_space", export_again)
    with pytest.raises(ArtifactError, match="was replaced while engines were built for it: build them again"):
        build_engine(target, "new")
    assert not engine_of(target).exists()
    assert read_manifest(find_manifest(target)).pad_id == 4


def test_exports_to_one_place_at_once_leave_one_of_them_whole(tmp_path: Path) -> None:
    """Four processes, each exporting three times, beside files of others."""
    script = (
        "import sys; from pathlib import Path; from tests.artifact.killed_writers import export\n"
        "for number in range(3):\n"
        "    for target in sys.argv[2:]:\n"
        "        export(Path(target), sys.argv[1])\n"
    )
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    targets = [tmp_path / "policy", tmp_path / "policy.onnx"]
    processes = [
        subprocess.Popen([sys.executable, "-c", script, version, *targets], stderr=subprocess.PIPE)
        for version in ("old", "new") * 2
    ]
    ended = [(process.communicate(timeout=200)[1], process.returncode) for process in processes]
    assert ended == [(b"", 0)] * 4
    for target in targets:
        files = ArtifactFiles.of(target)
        manifest = read_manifest(find_manifest(target))
        check_files(manifest.files, files.folder)
        kinds = {(files.folder / record.name).read_text(encoding="utf-8").split()[0] for record in manifest.files}
        assert len(kinds) == 1
    assert (tmp_path / "precious.txt").read_text(encoding="utf-8") == "mine"
    assert not list(tmp_path.glob(".*"))

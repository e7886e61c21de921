"""Artifacts by their id on the Hugging Face hub, in a cache as the hub's client lays it out: files are links."""

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnx
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from numpy.typing import NDArray
from onnx import checker, helper

import evla_compile as evla
from evla_compile.artifact.cases import RecordedCase, probe, recorded_stages, write_cases
from evla_compile.artifact.hub import local_artifact
from evla_compile.artifact.manifest import read_manifest, write_manifest
from evla_compile.artifact.records import FileRecord
from evla_compile.errors import ArtifactError, EvlaError, VerificationError
from evla_compile.host.inputs import GraphInputs, draw_noise
from evla_compile.runtime import load
from evla_compile.runtime.linked_weights import follow_links, read_checked
from tests.runtime.test_runtime import CHUNK, SIDE, TEXT, WIDTH, export, toy_graph

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/toy-policy"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    """A toy policy with external data and one recorded case; each of its stages is the noise."""
    folder = export(tmp_path_factory.mktemp("published") / "policy", tokenizer_json)
    stages = recorded_stages(read_manifest(folder / "manifest.json"))
    graph = toy_graph()
    graph.graph.node.extend(helper.make_node("Identity", ["noise"], [stage]) for stage in stages if stage != "samples")
    export(folder, tokenizer_json, graph=graph)
    inputs: dict[str, NDArray[Any]] = {
        "image": np.full((1, SIDE, SIDE, 3), 51, dtype=np.uint8),
        "input_ids": np.full((1, TEXT), 50, dtype=np.int64),
        "text_length": np.array([7], dtype=np.int64),
        "noise": draw_noise((1, CHUNK, WIDTH), 1),
    }
    probes = {stage: probe(stage, inputs["noise"], TEXT) for stage in stages if stage != "samples"}
    case = RecordedCase(inputs=GraphInputs(**inputs), outputs=load(folder).outputs(**inputs), stages=probes)
    write_cases([case], folder / "cases.npz")
    manifest = read_manifest(folder / "manifest.json")
    write_manifest(replace(manifest, cases=FileRecord.measure(folder / "cases.npz")), folder / "manifest.json")
    return folder


def in_cache(artifact: Path, cache: Path, names: Sequence[str] | None = None) -> Path:
    """Lay files of an artifact out as the hub's client does; return the folder of the snapshot."""
    root = cache / "models--someone--toy-policy"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (root / "blobs").mkdir(exist_ok=True)
    for file in artifact.iterdir():
        if (names is None or file.name in names) and not (snapshot / file.name).exists():
            blob = hashlib.sha256(file.read_bytes()).hexdigest()
            (root / "blobs" / blob).write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob)
    return snapshot


Hub = Callable[[Path], list[tuple[str, str | None, list[str]]]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Let the hub serve an artifact's folder; the list that is returned grows by every download."""

    def serve(folder: Path) -> list[tuple[str, str | None, list[str]]]:
        calls: list[tuple[str, str | None, list[str]]] = []

        def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            calls.append((repo_id, revision, allow_patterns))
            names = [file.name for file in folder.iterdir() if any(fnmatch(file.name, p) for p in allow_patterns)]
            return str(in_cache(folder, tmp_path / "cache", names))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls

    return serve


def test_a_cache_of_links_is_run_and_verified(artifact: Path, tmp_path: Path) -> None:
    snapshot = in_cache(artifact, tmp_path)
    with pytest.raises(checker.ValidationError, match="symbolic link"):
        checker.check_model(str(snapshot / "model.onnx"))  # what the verification has to get around
    expected = evla.verify(artifact, threads=1)
    assert evla.verify(snapshot, threads=1) == expected
    assert load(snapshot, mapped=True).manifest == load(artifact).manifest


def test_other_contents_behind_a_link_are_refused(artifact: Path, tmp_path: Path) -> None:
    snapshot = in_cache(artifact, tmp_path)
    data = (snapshot / "model.onnx.data").resolve()
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    for refuse in (load, evla.verify, lambda path: load(path, check_hashes=False)):
        with pytest.raises(ArtifactError, match=r"model\.onnx\.data is a link that leads out of the artifact"):
            refuse(snapshot)


def test_an_id_is_downloaded_manifest_first_and_without_what_is_not_needed(artifact: Path, hub: Hub) -> None:
    calls = hub(artifact)
    policy = load(ID)
    assert policy.manifest == read_manifest(artifact / "manifest.json")
    names = ["model.onnx", "model.onnx.data", "tokenizer.json", "report.json", "cases.npz"]
    assert calls == [(ID, None, ["manifest.json"]), (ID, COMMIT, ["manifest.json", *names])]
    assert evla.verify(ID, threads=1) == evla.verify(artifact, threads=1)
    assert evla.verify(Path(ID), threads=1).cases == 1  # as the command line passes it


def test_a_folder_of_that_name_is_never_looked_for_on_the_hub(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / ID).symlink_to(artifact)
    assert load(ID).manifest == read_manifest(artifact / "manifest.json")
    for path in ("absent", "a/b/c", "/absent/policy", "../policy", "a/policy.onnx", "a/policy.engine", "a/b.json"):
        with pytest.raises(ArtifactError, match="is no compiled policy"):
            load(path)


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), ConnectionError("no route"), "http"])
def test_without_a_network_both_ways_are_named(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def fail(*arguments: object, **settings: object) -> str:
        raise HfHubHTTPError.__bases__[0]("404") if error == "http" else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for refuse in (load, evla.verify):
        with pytest.raises(
            ArtifactError,
            match=r"someone/toy-policy: no such folder here, and it cannot be had from the Hugging Face hub \(.*\);"
            " check the name and the network, or download the repository elsewhere and give its folder",
        ):
            refuse(ID)


def test_without_the_hub_s_client_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EvlaError, match=r"someone/toy-policy: no such folder here, .* pip install huggingface_hub"):
        load(ID)


def test_a_repository_of_something_else_is_said_before_it_is_downloaded(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(bytes(10))
    calls = hub(tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json at its top, so it is no compiled policy"):
        load(ID)
    assert calls == [(ID, None, ["manifest.json"])]


def test_files_that_neither_hub_nor_cache_have_are_named(artifact: Path, tmp_path: Path, hub: Hub) -> None:
    """As of a cache that another command filled, without a network."""
    (tmp_path / "half").mkdir()
    for name in ("manifest.json", "model.onnx", "tokenizer.json"):
        (tmp_path / "half" / name).write_bytes((artifact / name).read_bytes())
    hub(tmp_path / "half")
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data, report\.json, cases\.npz of its manifest are not in"):
        load(ID)


def test_names_are_no_patterns(artifact: Path, hub: Hub) -> None:
    calls = hub(artifact)
    local_artifact(ID, lambda manifest: [manifest.tokenizer])
    with pytest.raises(ArtifactError, match="model"):
        local_artifact(ID, lambda manifest: [replace(manifest.tokenizer, name="model[1].*")])
    assert calls[-1][2] == ["manifest.json", "model[[]1].[*]"]


def test_a_graph_behind_links_is_still_checked(artifact: Path, tmp_path: Path) -> None:
    snapshot = in_cache(artifact, tmp_path)
    model = onnx.load(str(snapshot / "model.onnx"), load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    (snapshot / "model.onnx").unlink()
    onnx.save(model, snapshot / "model.onnx")
    with pytest.raises(checker.ValidationError, match="NoSuchOperator"):
        read_checked(snapshot / "model.onnx")
    manifest = read_manifest(snapshot / "manifest.json")
    part = replace(manifest.parts[0], model=FileRecord.measure(snapshot / "model.onnx"))
    (snapshot / "manifest.json").unlink()
    write_manifest(replace(manifest, parts=(part,)), snapshot / "manifest.json")
    with pytest.raises(VerificationError, match=r"onnx\.checker refuses it"):
        evla.verify(snapshot)


def test_links_to_several_folders_are_refused(artifact: Path, tmp_path: Path) -> None:
    model = onnx.load(str(artifact / "model.onnx"), load_external_data=False)
    (gain,) = [tensor for tensor in model.graph.initializer if tensor.external_data]
    other = model.graph.initializer.add()
    other.CopyFrom(gain)
    other.external_data[0].value = "other.data"
    for name in ("model.onnx.data", "other.data"):
        (tmp_path / name).mkdir()
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / name / "blob").write_bytes(b"")
        (tmp_path / "here" / name).symlink_to(tmp_path / name / "blob")
    with pytest.raises(ArtifactError, match="expected one folder: copy the artifact with its links followed, cp -rL"):
        follow_links(model, tmp_path / "here")


def test_the_hub_s_client_is_imported_only_for_an_id(artifact: Path) -> None:
    script = (
        "import sys\nfrom evla_compile.runtime import load\nload(sys.argv[1])\n"
        "assert not {'huggingface_hub', 'torch', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, artifact], check=True, timeout=120)

"""Manifests as untrusted input, files against their hashes, and artifacts written whole or not at all."""

import errno
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from evla_compile.artifact.files import ArtifactFiles, check_files, check_target, find_manifest, writing
from evla_compile.artifact.manifest import Manifest, read_manifest, write_manifest
from evla_compile.artifact.records import EngineRecord, FileRecord, Part, TensorSpec
from evla_compile.errors import ArtifactError
from evla_compile.host.processor import ActionStatistics
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan

CONFIG = CompileConfig(keep_layers=(0, 2), mlp_keep=0.5, text_tokens=20)
INPUTS = (
    TensorSpec(name="image", dtype="uint8", shape=(1, 28, 28, 3)),
    TensorSpec(name="input_ids", dtype="int64", shape=(1, 20)),
    TensorSpec(name="text_length", dtype="int64", shape=(1,)),
    TensorSpec(name="noise", dtype="float32", shape=(1, 16, 7)),
)
SAMPLES = TensorSpec(name="samples", dtype="float32", shape=(1, 16, 7))
KEPT = TensorSpec(name="kept_patches", dtype="int64", shape=(1, 2))

ENGINE = EngineRecord(
    flavour="tensorrt_rtx",
    version="1.7.1.116",
    files=(FileRecord(name="model.engine", sha256="0" * 64, size=1),),
    layers=(3,),
    platform="linux-x86_64",
    gpu=None,
    gpu_processors=None,
    gpu_memory_bytes=None,
    compute_capabilities=("8.9", "12.0"),
    hardware_compatible=False,
    version_compatible=False,
)


def manifest_of(folder: Path, files: ArtifactFiles) -> Manifest:
    data = folder / files.data
    return Manifest(
        created_by="0.0.0",
        parts=(
            Part(
                name="policy",
                model=FileRecord.measure(folder / files.model),
                data=(FileRecord.measure(data),) if data.exists() else (),
                inputs=INPUTS,
                outputs=(SAMPLES, KEPT),
            ),
        ),
        engine=None,
        precision="float32",
        tokenizer=FileRecord.measure(folder / files.tokenizer),
        report=FileRecord.measure(folder / files.report),
        cases=FileRecord.measure(folder / files.cases),
        inputs=INPUTS,
        outputs=(SAMPLES, KEPT),
        config=CONFIG,
        plan=Plan(decisions=(LayerDecision(keep=(0, 2)),)),
        statistics={"toy": ActionStatistics(low=(-1.0,) * 7, high=(1.0,) * 7, mask=(True,) * 6 + (False,))},
        vocabulary=64,
        pad_id=3,
        opset=23,
        versions={"torch": "2.13.0"},
    )


def fill(folder: Path, files: ArtifactFiles, *, graph: str = "graph", data: str | None = "weights") -> None:
    """Write a whole artifact with the names of a target into a folder."""
    (folder / files.model).write_text(graph, encoding="utf-8")
    if data is not None:
        (folder / files.data).write_text(data, encoding="utf-8")
    (folder / files.tokenizer).write_text("{}", encoding="utf-8")
    (folder / files.report).write_text("{}", encoding="utf-8")
    (folder / files.cases).write_text("cases", encoding="utf-8")
    write_manifest(manifest_of(folder, files), folder / files.manifest)


def write(
    target: Path,
    *,
    graph: str = "graph",
    data: str | None = "weights",
    at_last: Callable[[], object] = lambda: None,
) -> Manifest:
    """Write a whole artifact to a target; `at_last` is called before the block ends."""
    with writing(target) as folder:
        fill(folder, ArtifactFiles.of(target), graph=graph, data=data)
        at_last()
    return read_manifest(find_manifest(target))


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder; files with what they hold."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8") if path.is_file() else "a folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(params=["policy", "policy.onnx"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An artifact's folder, then a single-file export."""
    return tmp_path / str(request.param)


# Manifest


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = write(tmp_path / "policy")
    assert read_manifest(tmp_path / "policy" / "manifest.json") == manifest
    assert manifest.config == CONFIG
    assert (manifest.signature.image_side, manifest.signature.noise_shape) == (28, (1, 16, 7))


def test_a_manifest_with_engines_is_read_back(tmp_path: Path) -> None:
    manifest = replace(write(tmp_path / "policy"), engine=ENGINE)
    write_manifest(manifest, tmp_path / "policy" / "manifest.json")
    assert read_manifest(tmp_path / "policy" / "manifest.json") == manifest
    assert ENGINE.files[0] in manifest.files


def test_a_record_holds_size_and_hash_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"abc")
    record = FileRecord.measure(tmp_path / "x.bin")
    assert (record.name, record.size) == ("x.bin", 3)
    assert record.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def put(*keys: str | int, value: object) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("format"), "'format' is missing"),
        (put("format", value="evla_compile/4"), r"'evla_compile/4', but this version.*'evla_compile/5'"),
        (drop("tokenizer"), "'tokenizer' is missing"),
        (put("created_by", value=1), "'created_by' is 1: expected a text"),
        (put("parts", 0, "model", value="model.onnx"), "'model' is 'model.onnx': expected an object"),
        (put("parts", 0, "model", "sha256", value="ab12"), "expected 64 hexadecimal digits"),
        (put("parts", 0, "model", "sha256", value=None), "'sha256' is None: expected a text"),
        (put("parts", 0, "model", "size", value=-1), "expected 0 bytes or more"),
        (put("parts", 0, "model", "size", value=5.0), "'size' is 5.0: expected a whole number"),
        (put("parts", 0, "model", "size", value=True), "'size' is True: expected a whole number"),
        (put("parts", 0, "data", value={}), "'data' is {}: expected a list"),
        (put("parts", 0, "data", 0, value="weights"), "'data' holds 'weights': expected objects"),
        (put("report", "name", value="tokenizer.json"), "expected names that differ"),
        (put("inputs", value=[]), r"inputs are \[\] as \(name, dtype, rank\)"),
        (put("inputs", 0, "name", value="pixels"), "inputs are .*pixels"),
        (put("inputs", 0, "dtype", value="float32"), "inputs are .*'image', 'float32'"),
        (put("inputs", 0, "dtype", value="bfloat16"), "dtype 'bfloat16' of 'image'"),
        (put("inputs", 0, "shape", value=[1, 28, 14, 3]), r"image uint8\[1, 28, 14, 3\]"),
        (put("inputs", 0, "shape", 0, value=0), r"shape \[0, 28, 28, 3\] of 'image'"),
        (put("inputs", 0, "shape", 0, value="batch"), r"shape \['batch', 28, 28, 3\] of 'image'"),
        (put("inputs", 0, "shape", 0, value=True), r"shape \[True, 28, 28, 3\] of 'image'"),
        (put("inputs", 1, "shape", value=[1, 21]), r"input_ids int64\[1, 21\]"),
        (put("inputs", 2, "shape", value=[2]), r"text_length int64\[2\]"),
        (put("inputs", 3, "shape", value=[2, 16, 7]), r"noise float32\[2, 16, 7\]"),
        (put("outputs", value=[]), r"expected samples float32\[1, 16, 7\]"),
        (put("outputs", 0, "shape", value=[1, 16, 8]), r"expected samples float32\[1, 16, 7\]"),
        (put("outputs", value=[asdict(SAMPLES), asdict(KEPT), asdict(KEPT)]), "names that differ"),
        (put("config", "ddim_steps", value=11), "ddim_steps=11"),
        (put("config", "unheard_of", value=1), r"unknown compile settings \['unheard_of'\]"),
        (lambda data: data["config"].pop("cfg_scale"), r"missing \['cfg_scale'\]"),
        (put("config", "text_tokens", value=24), r"input_ids int64\[1, 20\]"),
        (put("plan", value=[1]), r"'plan' is \[1\]: expected an object"),
        (put("plan", value={}), "it is no plan, or one from before plans had a format"),
        (put("plan", "mlp_neurons", value=["0-99999"] * 1000), "neurons of 1000 layers for 2 kept layers"),
        (put("statistics", value={}), "dataset statistics"),
        (put("statistics", "toy", "action", "q01", value=[0]), "'toy'.*q01"),
        (
            put("statistics", "toy", "action", value={"q01": [-1.7e308] * 7, "q99": [1.7e308] * 7}),
            "'toy'.*action number 0 spans",
        ),
        (put("parts", value=[]), "no part yields"),
        (put("parts", 0, "name", value="../policy"), "part '../policy': expected a name"),
        (put("parts", 0, "inputs", 0, "shape", value=[1, 42, 42, 3]), r"part policy takes image uint8\[1, 42, 42, 3\]"),
        (put("parts", 0, "outputs", 1, "name", value="noise"), "part policy yields noise, which something in front"),
        (put("parts", 0, "outputs", value=[asdict(KEPT)]), r"no part yields samples float32"),
        (put("precision", value="int4"), "precision 'int4': expected one of float32, bfloat16, float16"),
        (put("engine", value=asdict(ENGINE) | {"flavour": "trt"}), "flavour 'trt': expected one of tensorrt"),
        (put("engine", value=asdict(ENGINE) | {"compute_capabilities": ["sm89"]}), "compute capability 'sm89'"),
        (put("engine", value=asdict(ENGINE) | {"files": []}), "0 engines for 1 parts"),
        (put("engine", value=asdict(ENGINE) | {"layers": [0]}), r"layers \[0\]: expected whole numbers from 1 up"),
        (put("engine", value=asdict(ENGINE) | {"gpu": 4090}), "'gpu' is 4090: expected a text"),
        (put("pad_id", value=-1), "pad_id -1"),
        (put("pad_id", value=64), "pad_id 64: expected a token id from 0 to 63"),
        (put("pad_id", value=2**63), "pad_id 9223372036854775808: expected a token id"),
        (put("pad_id", value=10**400), "pad_id 10000000000000000000: expected a token id"),
        (put("vocabulary", value=0), "vocabulary 0: expected the rows of the token embedding"),
        (put("vocabulary", value=2**31), "vocabulary 2147483648: expected the rows"),
        (drop("vocabulary"), "'vocabulary' is missing"),
        (put("plan", "layer_importance", value=[0.1, 0.2]), "layer_importance of 2 decoder layers.*keeps layer 2"),
        (put("opset", value="23"), "'opset' is '23': expected a whole number"),
        (put("versions", "torch", value=2), "'torch' is 2: expected a text"),
    ],
)
def test_a_malformed_manifest_is_refused_by_its_path_and_what_is_wrong(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    write(tmp_path / "policy")
    place = tmp_path / "policy" / "manifest.json"
    data = json.loads(place.read_text(encoding="utf-8"))
    change(data)
    place.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ArtifactError, match=message) as caught:
        read_manifest(place)
    assert str(place) in str(caught.value)


@pytest.mark.parametrize("kind", ["model", "tokenizer", "report", "cases"])
@pytest.mark.parametrize(
    "name", ["", ".", "..", "../model.onnx", "/etc/passwd", "sub/model.onnx", "sub\\model.onnx", "C:model.onnx", "m\0"]
)
def test_a_file_name_that_leads_elsewhere_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    write(tmp_path / "policy")
    place = tmp_path / "policy" / "manifest.json"
    data = json.loads(place.read_text(encoding="utf-8"))
    record = data["parts"][0][kind] if kind == "model" else data[kind]
    record["name"] = name
    place.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ArtifactError, match="expected a plain name without folders"):
        read_manifest(place)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b'{"format": "evla', "Unterminated string"),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff\xfe", "decode"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_file_that_holds_no_json_object_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=message):
        read_manifest(tmp_path / "manifest.json")


def test_an_unreadable_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Is a directory"):
        read_manifest(tmp_path)


# Finding and checking


@pytest.mark.parametrize(
    ("target", "given", "found"),
    [
        ("policy", "policy", "policy/manifest.json"),
        ("policy", "policy/model.onnx", "policy/manifest.json"),
        ("policy", "policy/manifest.json", "policy/manifest.json"),
        ("policy.onnx", "policy.onnx", "policy.manifest.json"),
        ("policy.v2.onnx", "policy.v2.onnx", "policy.v2.manifest.json"),
        ("policy.onnx", "policy.manifest.json", "policy.manifest.json"),
        ("model.onnx", "model.onnx", "model.manifest.json"),
    ],
)
def test_a_manifest_is_found_from_every_way_to_name_its_artifact(
    tmp_path: Path, target: str, given: str, found: str
) -> None:
    write(tmp_path / target)
    assert find_manifest(tmp_path / given) == tmp_path / found
    assert find_manifest(str(tmp_path / given)) == tmp_path / found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("absent", "absent/manifest.json"),
        ("policy.onnx", "policy.manifest.json"),
        ("model.onnx", "model.manifest.json or .*/manifest.json"),
        ("x.manifest.json", "x.manifest.json"),
    ],
)
def test_without_a_manifest_the_place_where_it_was_expected_is_named(tmp_path: Path, given: str, expected: str) -> None:
    with pytest.raises(ArtifactError, match=f"no compiled policy: expected its manifest at .*{expected}"):
        find_manifest(tmp_path / given)


def test_a_graph_that_an_artifact_does_not_know_gets_no_manifest(tmp_path: Path) -> None:
    write(tmp_path / "policy")
    with pytest.raises(ArtifactError, match="no compiled policy"):
        find_manifest(tmp_path / "policy" / "other.onnx")


def test_intact_files_pass(target: Path) -> None:
    check_files(write(target).files, ArtifactFiles.of(target).folder)


@pytest.mark.parametrize("kind", ["model", "data", "tokenizer", "report", "cases"])
def test_a_missing_file_is_named_with_the_way_to_make_it_anew(target: Path, kind: str) -> None:
    manifest = write(target)
    files = ArtifactFiles.of(target)
    place = files.folder / getattr(files, kind)
    place.unlink()
    with pytest.raises(ArtifactError, match=rf"{place} is missing.*evla compile RUN_DIR .* --out {files.folder}"):
        check_files(manifest.files, files.folder)


@pytest.mark.parametrize("kind", ["model", "data", "tokenizer", "report", "cases"])
def test_a_file_of_another_size_is_refused_even_without_hashing(target: Path, kind: str) -> None:
    manifest = write(target)
    files = ArtifactFiles.of(target)
    place = files.folder / getattr(files, kind)
    size = place.stat().st_size
    place.write_bytes(place.read_bytes() + b"\n")
    with pytest.raises(ArtifactError, match=rf"{place} has {size + 1} bytes, the manifest says {size}"):
        check_files(manifest.files, files.folder, hashes=False)


@pytest.mark.parametrize("kind", ["model", "data", "tokenizer", "report", "cases"])
def test_a_changed_file_is_refused_with_both_hashes(target: Path, kind: str) -> None:
    manifest = write(target)
    files = ArtifactFiles.of(target)
    place = files.folder / getattr(files, kind)
    expected = FileRecord.measure(place).sha256[:12]
    place.write_bytes(place.read_bytes()[:-1] + b"?")
    found = FileRecord.measure(place).sha256[:12]
    with pytest.raises(ArtifactError, match=rf"{place} has the SHA-256 {found}\.\.\., the manifest says {expected}"):
        check_files(manifest.files, files.folder)
    check_files(manifest.files, files.folder, hashes=False)


@pytest.mark.parametrize("contents", ["Graph", "another graph"])
@pytest.mark.parametrize("hashes", [False, True])
def test_a_link_to_something_else_is_refused(tmp_path: Path, contents: str, hashes: bool) -> None:
    manifest = write(tmp_path / "policy", graph="graph")
    model = tmp_path / "policy" / "model.onnx"
    model.unlink()
    (tmp_path / "elsewhere.onnx").write_text(contents, encoding="utf-8")
    model.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ArtifactError, match=r"model\.onnx is a link that leads out of the artifact, to .*elsewhere"):
        check_files(manifest.files, tmp_path / "policy", hashes=hashes)


def test_a_link_to_the_contents_that_the_manifest_describes_passes(tmp_path: Path) -> None:
    """As in Hugging Face's cache."""
    manifest = write(tmp_path / "policy")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate((tmp_path / "policy").iterdir()):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    check_files(manifest.files, tmp_path / "policy")
    check_files(manifest.files, tmp_path / "policy", hashes=False)
    assert read_manifest(find_manifest(tmp_path / "policy")) == manifest


def test_a_link_that_leads_nowhere_is_a_missing_file(tmp_path: Path) -> None:
    manifest = write(tmp_path / "policy")
    (tmp_path / "policy" / "model.onnx").unlink()
    (tmp_path / "policy" / "model.onnx").symlink_to(tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        check_files(manifest.files, tmp_path / "policy")


# Writing


def test_an_artifact_appears_whole_and_nothing_else_stays(target: Path, tmp_path: Path) -> None:
    with writing(target) as folder:
        assert list(folder.iterdir()) == []
        assert folder.parent.parent == tmp_path
        assert folder.parent.name.startswith(f".{target.name}.partial-")
        fill(folder, ArtifactFiles.of(target))
        assert not target.exists()
    names = {
        "policy": ["cases.npz", "manifest.json", "model.onnx", "model.onnx.data", "report.json", "tokenizer.json"],
        "policy.onnx": [
            "policy.cases.npz",
            "policy.manifest.json",
            "policy.onnx",
            "policy.onnx.data",
            "policy.report.json",
            "policy.tokenizer.json",
        ],
    }
    folder = ArtifactFiles.of(target).folder
    assert sorted(path.name for path in folder.iterdir()) == names[target.name]
    assert [path.name for path in tmp_path.glob(".*")] == []
    check_files(read_manifest(find_manifest(target)).files, folder)


def test_an_artifact_s_folder_is_as_open_as_any_new_folder(tmp_path: Path) -> None:
    write(tmp_path / "policy")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "policy").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_target_may_be_relative_and_a_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", "../beside", "../single.onnx"):
        with writing(target) as folder:
            fill(folder, ArtifactFiles.of(target))
    assert Path("manifest.json").is_file()
    assert (tmp_path / "beside" / "manifest.json").is_file()
    assert (tmp_path / "single.manifest.json").is_file()


def test_a_former_artifact_is_replaced_and_its_external_data_does_not_linger(target: Path) -> None:
    write(target, graph="old graph", data="old weights")
    manifest = write(target, graph="new graph", data=None)
    files = ArtifactFiles.of(target)
    check_files(manifest.files, files.folder)
    assert (files.folder / files.model).read_text(encoding="utf-8") == "new graph"
    assert sorted(path.name for path in files.folder.iterdir()) == sorted(
        [files.model, files.tokenizer, files.report, files.cases, files.manifest]
    )


def test_a_former_artifact_with_a_lost_file_is_replaced(target: Path) -> None:
    write(target)
    files = ArtifactFiles.of(target)
    (files.folder / files.data).unlink()
    check_files(write(target).files, files.folder)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    check_files(write(tmp_path / "policy").files, tmp_path / "policy")


def test_what_lies_beside_a_single_file_export_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    write(tmp_path / "policy.onnx")
    write(tmp_path / "policy.onnx")
    assert contents(tmp_path)["notes.txt"] == "mine"


def foreign_folder(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").write_text("mine", encoding="utf-8")


def foreign_model(target: Path) -> None:
    target.write_text("mine", encoding="utf-8")


def foreign_tokenizer(target: Path) -> None:
    target.with_suffix(".tokenizer.json").write_text("mine", encoding="utf-8")


def file_among_ours(target: Path) -> None:
    write(target)
    (target / "thesis.tex").write_text("mine", encoding="utf-8")


def foreign_manifest(target: Path) -> None:
    target.mkdir()
    (target / "manifest.json").write_text('{"name": "a web page"}', encoding="utf-8")


def foreign_manifest_beside(target: Path) -> None:
    write(target)
    target.with_suffix(".manifest.json").write_text('{"name": "a web page"}', encoding="utf-8")


def changed_model(target: Path) -> None:
    write(target)
    change_model(target)


def change_model(target: Path) -> None:
    files = ArtifactFiles.of(target)
    (files.folder / files.model).write_text("mine alone", encoding="utf-8")


def claim(target: Path, path: Path) -> None:
    """Let the manifest of an artifact list a file that it never had."""
    files = ArtifactFiles.of(target)
    manifest = read_manifest(files.folder / files.manifest)
    record = replace(manifest.report, name=path.name)
    write_manifest(replace(manifest, report=record), files.folder / files.manifest)


def listed_thesis(target: Path) -> None:
    file_among_ours(target)
    claim(target, target / "thesis.tex")
    (target / "report.json").unlink()


def test_a_file_that_a_manifest_lists_and_does_not_describe_is_never_removed(tmp_path: Path) -> None:
    write(tmp_path / "x.onnx")
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    claim(tmp_path / "x.onnx", tmp_path / "precious.txt")
    (tmp_path / "x.report.json").unlink()
    write(tmp_path / "x.onnx", graph="new graph")
    assert contents(tmp_path)["precious.txt"] == "mine"
    assert contents(tmp_path)["x.onnx"] == "new graph"


def test_a_single_file_export_owns_only_files_of_its_own_name(tmp_path: Path) -> None:
    """Even where a tampered manifest has the right hash."""
    write(tmp_path / "x.onnx")
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    files = ArtifactFiles.of(tmp_path / "x.onnx")
    manifest = read_manifest(tmp_path / files.manifest)
    record = FileRecord.measure(tmp_path / "precious.txt")
    write_manifest(replace(manifest, report=record), tmp_path / files.manifest)
    (tmp_path / "x.report.json").unlink()
    write(tmp_path / "x.onnx")
    assert contents(tmp_path)["precious.txt"] == "mine"


@pytest.mark.parametrize(
    ("name", "prepare", "message"),
    [
        ("policy", foreign_folder, "holds thesis.tex, which no manifest of ours lists"),
        ("policy", file_among_ours, "holds thesis.tex, which no manifest of ours lists"),
        ("policy", foreign_manifest, "exists and is not ours .*'format' is missing"),
        ("policy.onnx", foreign_model, "holds policy.onnx, which no manifest of ours lists"),
        ("policy.onnx", foreign_tokenizer, "holds policy.tokenizer.json, which no manifest of ours lists"),
        ("policy.onnx", foreign_manifest_beside, "exists and is not ours .*'format' is missing"),
        ("policy", changed_model, "holds model.onnx, which differs from what its manifest describes"),
        ("policy.onnx", changed_model, "holds policy.onnx, which differs from what its manifest describes"),
        ("policy", listed_thesis, "holds thesis.tex, which differs from what its manifest describes"),
    ],
)
def test_what_is_not_ours_is_refused_before_the_work_and_left_alone(
    tmp_path: Path, name: str, prepare: Callable[[Path], None], message: str
) -> None:
    prepare(tmp_path / name)
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match=f"{message}.*choose another --out or remove it"), writing(tmp_path / name):
        pytest.fail("the block must not run")
    with pytest.raises(ArtifactError, match=message):
        check_target(tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("former", [False, True])
def test_checking_a_target_that_may_be_written_leaves_no_trace(target: Path, former: bool) -> None:
    if former:
        write(target)
    before = contents(target.parent)
    check_target(target)
    assert contents(target.parent) == before


def test_a_change_that_keeps_the_size_is_found_before_anything_is_written(target: Path) -> None:
    write(target, graph="graph")
    files = ArtifactFiles.of(target)
    (files.folder / files.model).write_text("Graph", encoding="utf-8")
    with pytest.raises(ArtifactError, match="differs from what its manifest describes"), writing(target):
        pytest.fail("the block must not run")


def test_what_killed_exports_and_builds_left_is_removed(target: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(target)
    before = contents(target.parent)
    files = ArtifactFiles.of(target)
    left = [target.with_name(f".{target.name}.partial-0123abcd"), files.folder / f".{files.engine}.partial-0123abcd"]
    for folder in left:
        folder.mkdir()
        (folder / files.data).write_bytes(bytes(1_000_000))
    check_target(target)
    assert contents(target.parent) == before
    for folder in left:
        assert f"removed {folder} (1.0 MB), left by a process that was killed" in caplog.text


def test_a_reader_is_told_of_files_that_were_being_moved(target: Path) -> None:
    left = target.with_name(f".{target.name}.partial-0123abcd")
    left.mkdir()
    (left / "journal.json").touch()
    with pytest.raises(ArtifactError, match="is incomplete: an export was killed, or is at work"):
        find_manifest(target)


@pytest.mark.parametrize(
    "journal",
    [
        "",
        "[]",
        '{"former": [], "new": []}',
        '{"former": [], "new": ["../x"], "manifest": "manifest.json"}',
        '{"former": [], "new": ["x"], "manifest": "/etc/passwd"}',
        '{"former": [{"name": "x"}], "new": [], "manifest": "manifest.json"}',
        '{"former": [3], "new": [], "manifest": "manifest.json"}',
        '{"former": 3, "new": [], "manifest": "manifest.json"}',
    ],
)
def test_a_malformed_journal_is_refused_by_name(tmp_path: Path, journal: str) -> None:
    (tmp_path / "policy").mkdir()
    left = tmp_path / ".policy.partial-0123abcd"
    (left / "new").mkdir(parents=True)
    (left / "journal.json").write_text(journal, encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"{left}/journal\.json: .*it describes an export that was killed: remove"):
        check_target(tmp_path / "policy")


def test_a_file_that_came_in_the_way_of_a_killed_export_is_not_replaced(tmp_path: Path) -> None:
    left = tmp_path / ".x.onnx.partial-0123abcd"
    (left / "new").mkdir(parents=True)
    fill(left / "new", ArtifactFiles.of(tmp_path / "x.onnx"))
    journal = {
        "former": [],
        "new": sorted(path.name for path in (left / "new").iterdir()),
        "manifest": "x.manifest.json",
    }
    (left / "journal.json").write_text(json.dumps(journal), encoding="utf-8")
    foreign_model(tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match=r"x\.onnx is not ours.*move it elsewhere, then export again"):
        check_target(tmp_path / "x.onnx")
    (tmp_path / "x.onnx").rename(tmp_path / "mine.onnx")
    check_target(tmp_path / "x.onnx")
    check_files(read_manifest(find_manifest(tmp_path / "x.onnx")).files, tmp_path)
    assert (tmp_path / "mine.onnx").read_text(encoding="utf-8") == "mine"
    assert not left.exists()


def test_a_killed_export_into_a_folder_that_was_deleted_since_is_forgotten(tmp_path: Path) -> None:
    left = tmp_path / ".policy.partial-0123abcd"
    (left / "new").mkdir(parents=True)
    (left / "journal.json").write_text('{"former": [], "new": [], "manifest": "manifest.json"}', encoding="utf-8")
    check_target(tmp_path / "policy")
    write(tmp_path / "policy")
    check_files(read_manifest(find_manifest(tmp_path / "policy")).files, tmp_path / "policy")
    assert not left.exists()


def test_a_former_file_that_changes_during_the_work_is_not_replaced(target: Path) -> None:
    write(target)
    before = contents(target.parent)
    with pytest.raises(ArtifactError, match=r"differs from what its manifest describes"):
        write(target, at_last=lambda: change_model(target))
    files = ArtifactFiles.of(target)
    model = str((files.folder / files.model).relative_to(target.parent))
    assert contents(target.parent) == before | {model: "mine alone"}


def test_a_foreign_file_that_appears_during_the_work_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "policy.onnx"
    with pytest.raises(ArtifactError, match=r"holds policy\.onnx"):
        write(target, at_last=lambda: foreign_model(target))
    assert contents(tmp_path) == {"policy.onnx": "mine"}


@pytest.mark.parametrize("error", [RuntimeError("cannot lower"), KeyboardInterrupt()])
@pytest.mark.parametrize("former", [False, True])
def test_an_interrupted_block_leaves_all_as_it_was(target: Path, error: BaseException, former: bool) -> None:
    def fail() -> NoReturn:
        raise error

    if former:
        write(target, graph="old graph")
    before = contents(target.parent)
    with pytest.raises(type(error)):
        write(target, at_last=fail)
    assert contents(target.parent) == before


# A fresh folder is renamed in one move; other exports write a journal first. An export has six files; a replacement
# moves five old files aside before.
MOVES = [("policy", False, 1), ("policy.onnx", False, 7), ("policy", True, 12), ("policy.onnx", True, 12)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("name", "former", "failing"), [(name, former, n) for name, former, moves in MOVES for n in range(moves)]
)
def test_an_interrupt_at_any_move_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, name: str, former: bool, failing: int
) -> None:
    target = tmp_path / name
    if former:
        write(target, graph="old graph", data=None)
    before = contents(tmp_path)
    original, calls = Path.replace, iter(range(100))

    def interrupted(source: Path, destination: Path) -> Path:
        if next(calls) == failing:
            raise error
        return original(source, destination)

    monkeypatch.setattr(Path, "replace", interrupted)
    expected = ArtifactError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write(target, graph="new graph")
    assert contents(tmp_path) == before


def test_the_manifest_moves_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    original = Path.replace

    def recording(source: Path, destination: Path) -> Path:
        moved.append(destination.name)
        return original(source, destination)

    monkeypatch.setattr(Path, "replace", recording)
    write(tmp_path / "a.onnx")
    assert moved[0] == "journal.json"
    assert moved[-1] == "a.manifest.json"
    assert len(moved) == 7


def test_a_full_disk_during_the_work_is_said_and_leaves_nothing(target: Path, tmp_path: Path) -> None:
    def fail() -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match=rf"{target} cannot be written: .*No space left") as caught:
        write(target, at_last=fail)
    assert isinstance(caught.value.__cause__, OSError)
    assert contents(tmp_path) == {}


def test_an_unwritable_parent_is_said_before_the_work(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArtifactError, match=f"Permission denied.*{target.parent} to be a writable folder"):
        check_target(target)


@pytest.mark.parametrize("parent", ["absent", "file"])
def test_a_parent_that_is_no_folder_is_said_before_the_work(target: Path, parent: str) -> None:
    target.with_name("file").write_text("mine", encoding="utf-8")
    place = target.parent / parent / target.name
    with pytest.raises(ArtifactError, match=f"{place} cannot be written"), writing(place):
        pytest.fail("the block must not run")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy").write_text("mine", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"cannot be written.*choose another --out"):
        write(tmp_path / "policy")
    assert contents(tmp_path) == {"policy": "mine"}


@pytest.mark.parametrize("name", ["gpu", "gpu_processors", "gpu_memory_bytes"])
def test_an_engine_of_tensorrt_describes_the_gpu_that_built_it(name: str) -> None:
    described: dict[str, Any] = {"gpu": "NVIDIA L4", "gpu_processors": 58, "gpu_memory_bytes": 24 * 2**30}
    engine = replace(ENGINE, flavour="tensorrt", **described)
    assert EngineRecord.from_json(json.loads(json.dumps(asdict(engine)))) == engine
    assert EngineRecord.from_json(json.loads(json.dumps(asdict(ENGINE)))) == ENGINE
    with pytest.raises(ValueError, match=r"gpu, gpu_processors and gpu_memory_bytes are .*None.*: expected those of"):
        replace(engine, **{**described, name: None})

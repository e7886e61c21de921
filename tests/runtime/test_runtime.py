"""The runtime on a toy graph, and the package's lazy names, which keep it free of torch."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any, NoReturn, get_args

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import evla_compile
from evla_compile.artifact.files import ArtifactFiles, find_manifest, writing
from evla_compile.artifact.manifest import Manifest, read_manifest, write_manifest
from evla_compile.artifact.records import FileRecord, Part, TensorSpec
from evla_compile.cli.next_steps import batch_example
from evla_compile.errors import ArtifactError, EvlaError
from evla_compile.host.camera_frame import Framing
from evla_compile.host.inputs import draw_noise
from evla_compile.host.processor import ActionStatistics, Processor
from evla_compile.runtime import Provider, RuntimePolicy, load, onnx_session, onnx_versions
from evla_compile.runtime.providers import PROVIDERS
from evla_compile.runtime.widening import read_widened
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan
from tests.cli.command_line import evla, refused

onnxruntime: Any = importlib.import_module("onnxruntime")  # it ships no type stubs

SIDE, TEXT, CHUNK, WIDTH, PAD, VOCABULARY = 28, 20, 16, 7, 31999, 32064
STATISTICS = {"toy": ActionStatistics(low=(-0.5,) * 7, high=(1.5,) * 7, mask=(True,) * 6 + (False,))}
GAIN = np.linspace(0.5, 1.5, CHUNK * WIDTH, dtype=np.float32).reshape(CHUNK, WIDTH)


def toy_graph(
    batch: int | str = 1, *, chunk: int = CHUNK, dtype: int = TensorProto.FLOAT, samples: str = "samples"
) -> onnx.ModelProto:
    """samples = noise * gain + (mean(image) + text_length) / 255 + sum(ids) / 1e6, and the text lengths once more."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "of_image"], ["mean"], keepdims=0),
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ids", "of_text"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["text_length"], ["length"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["mean", "length"], ["bytes"]),
        helper.make_node("Div", ["bytes", "white"], ["brightness"]),
        helper.make_node("Div", ["sum", "million"], ["words"]),
        helper.make_node("Add", ["brightness", "words"], ["shift"]),
        helper.make_node("Unsqueeze", ["shift", "of_text_and_image"], ["shift_3d"]),
        helper.make_node("Mul", ["noise", "gain"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift_3d"], ["sum_3d"]),
        helper.make_node("Cast", ["sum_3d"], [samples], to=dtype),
        helper.make_node("Identity", ["text_length"], ["lengths"]),
    ]
    constants = {
        "of_image": np.array([1, 2, 3]),
        "of_text": np.array([1]),
        "of_text_and_image": np.array([1, 2]),
        "white": np.array(255, dtype=np.float32),
        "million": np.array(1e6, dtype=np.float32),
        "gain": GAIN[:chunk],
    }
    graph = helper.make_graph(
        nodes,
        "toy",
        [
            value("image", TensorProto.UINT8, [batch, SIDE, SIDE, 3]),
            value("input_ids", TensorProto.INT64, [batch, TEXT]),
            value("text_length", TensorProto.INT64, [batch]),
            value("noise", TensorProto.FLOAT, [batch, chunk, WIDTH]),
        ],
        [value(samples, dtype, [batch, chunk, WIDTH]), value("lengths", TensorProto.INT64, [batch])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def narrow(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float32 numbers cut to what bfloat16 holds, their upper 16 bits."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def bfloat16_graph() -> onnx.ModelProto:
    """The toy policy with a bfloat16 gain, multiplied in bfloat16."""
    model = toy_graph()
    (gain,) = [tensor for tensor in model.graph.initializer if tensor.name == "gain"]
    bits = (GAIN.view(np.uint32) >> 16).astype(np.uint16)
    gain.CopyFrom(helper.make_tensor("gain", TensorProto.BFLOAT16, GAIN.shape, bits.tobytes(), raw=True))
    place = next(index for index, node in enumerate(model.graph.node) if node.op_type == "Mul")
    nodes = list(model.graph.node)
    nodes[place : place + 1] = [
        helper.make_node("Cast", ["noise"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["narrow", "gain"], ["product"]),
        helper.make_node("Cast", ["product"], ["scaled"], to=TensorProto.FLOAT),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def inputs_of(batch: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="image", dtype="uint8", shape=(batch, SIDE, SIDE, 3)),
        TensorSpec(name="input_ids", dtype="int64", shape=(batch, TEXT)),
        TensorSpec(name="text_length", dtype="int64", shape=(batch,)),
        TensorSpec(name="noise", dtype="float32", shape=(batch, CHUNK, WIDTH)),
    )


def outputs_of(batch: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="samples", dtype="float32", shape=(batch, CHUNK, WIDTH)),
        TensorSpec(name="lengths", dtype="int64", shape=(batch,)),
    )


def describe(folder: Path, names: ArtifactFiles, batch: int) -> Manifest:
    return Manifest(
        created_by="0.0.0",
        parts=(
            Part(
                name="policy",
                model=FileRecord.measure(folder / names.model),
                data=(FileRecord.measure(folder / names.data),),
                inputs=inputs_of(batch),
                outputs=outputs_of(batch),
            ),
        ),
        engine=None,
        precision="float32",
        tokenizer=FileRecord.measure(folder / names.tokenizer),
        report=FileRecord.measure(folder / names.report),
        cases=FileRecord.measure(folder / names.cases),
        inputs=inputs_of(batch),
        outputs=outputs_of(batch),
        config=CompileConfig.dense(text_tokens=TEXT, batch_size=batch),
        plan=Plan(decisions=(LayerDecision(keep=(0,)),)),
        statistics=STATISTICS,
        vocabulary=VOCABULARY,
        pad_id=PAD,
        opset=20,
        versions={"onnx": onnx.__version__},
    )


def export(target: Path, tokenizer_json: str, *, batch: int = 1, graph: onnx.ModelProto | None = None) -> Path:
    """Write the toy policy to a target, its gain as external data; return the target."""
    names = ArtifactFiles.of(target)
    with writing(target) as folder:
        onnx.save_model(
            graph or toy_graph(batch),
            folder / names.model,
            save_as_external_data=True,
            location=names.data,
            size_threshold=64,
        )
        (folder / names.tokenizer).write_text(tokenizer_json, encoding="utf-8")
        (folder / names.report).write_text("{}", encoding="utf-8")
        (folder / names.cases).write_text("", encoding="utf-8")
        write_manifest(describe(folder, names, batch), folder / names.manifest)
    return target


def remeasure(folder: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> None:
    """Make the manifest in a folder agree with files that a test has changed."""
    place = folder / "manifest.json"
    manifest = read_manifest(place)
    (part,) = manifest.parts
    manifest = replace(
        manifest,
        parts=(replace(part, model=FileRecord.measure(folder / part.model.name)),),
        tokenizer=FileRecord.measure(folder / manifest.tokenizer.name),
    )
    write_manifest(change(manifest), place)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    """The toy policy; tests leave it as it is."""
    return export(tmp_path_factory.mktemp("shared") / "policy", tokenizer_json)


@pytest.fixture(scope="module")
def policy(artifact: Path) -> RuntimePolicy:
    return load(artifact, threads=1)


@pytest.fixture
def inputs() -> dict[str, NDArray[Any]]:
    return {
        "image": np.full((1, SIDE, SIDE, 3), 51, dtype=np.uint8),
        "input_ids": np.full((1, TEXT), 50, dtype=np.int64),
        "text_length": np.array([7], dtype=np.int64),
        "noise": draw_noise((1, CHUNK, WIDTH), 1),
    }


# Running


def test_every_output_of_the_graph_is_returned_by_name(policy: RuntimePolicy, inputs: dict[str, NDArray[Any]]) -> None:
    outputs = policy.outputs(**inputs)
    assert sorted(outputs) == ["lengths", "samples"]
    assert outputs["lengths"].tolist() == [7]
    np.testing.assert_allclose(outputs["samples"], inputs["noise"] * GAIN + (51 + 7) / 255 + 50 * TEXT / 1e6, rtol=1e-6)
    assert np.array_equal(policy.sample(**inputs), outputs["samples"])


def test_a_frame_and_an_instruction_become_actions(
    policy: RuntimePolicy, tokenizer_json: str, frame: Image.Image
) -> None:
    processor = Processor(tokenizer_json=tokenizer_json, statistics=STATISTICS, image_side=SIDE, pad_id=PAD)
    ids, length = processor.text("open drawer", TEXT)
    noise = draw_noise((CHUNK, WIDTH), 4) / 2
    samples = noise * GAIN + (processor.image(frame).mean(dtype=np.float64) + length) / 255 + ids.sum() / 1e6
    actions = policy.predict_action(frame, "open drawer", noise=noise)
    assert actions.shape == (CHUNK, WIDTH)
    np.testing.assert_allclose(actions, processor.actions(samples), atol=1e-5)


def test_a_batch_of_two_keeps_its_rows_apart(tmp_path: Path, tokenizer_json: str, frame: Image.Image) -> None:
    pair = load(export(tmp_path / "policy", tokenizer_json, batch=2))
    single = load(export(tmp_path / "single", tokenizer_json))
    texts = ["open drawer", "pick coke can"]
    noise = draw_noise((2, CHUNK, WIDTH), 0) / 2
    actions = pair.predict_action([frame, frame.rotate(180)], texts, noise=noise)
    assert actions.shape == (2, CHUNK, WIDTH)
    for row, image, text, start in zip(actions, [frame, frame.rotate(180)], texts, noise, strict=True):
        np.testing.assert_allclose(row, single.predict_action(image, text, "toy", noise=start), atol=1e-5)


@pytest.mark.parametrize("framing", get_args(Framing))
def test_the_python_that_is_printed_for_a_batch_runs(
    tmp_path: Path, tokenizer_json: str, frame: Image.Image, framing: Framing
) -> None:
    folder, photo = export(tmp_path / "it's", tokenizer_json, batch=2), tmp_path / "photo.png"
    frame.save(photo)
    words = "o'c"
    lines = batch_example(folder, ["toy", "other"], photo, words, batch_size=2, framing=framing)
    names: dict[str, Any] = {}
    exec(dedent("\n".join(lines)).replace("'other'", "'toy'"), names)  # noqa: S102 - the lines that are printed
    expected = load(folder).predict_action([frame, frame], [words, words], framing=framing)
    assert np.array_equal(names["actions"], expected)


def test_evla_run_names_what_takes_a_batch(tmp_path: Path, tokenizer_json: str, frame: Image.Image) -> None:
    folder = export(tmp_path / "policy", tokenizer_json, batch=2)
    frame.save(tmp_path / "photo.png")
    message = refused(evla("run", folder, "--image", tmp_path / "photo.png", "--instruction", "open drawer"))
    assert "this policy takes 2 at a time: compile it with --batch-size 1, or in Python call" in message


def test_evla_run_takes_a_framing(artifact: Path, policy: RuntimePolicy, tmp_path: Path, frame: Image.Image) -> None:
    frame.save(tmp_path / "photo.png")
    given = ("run", artifact, "--image", tmp_path / "photo.png", "--instruction", "open drawer", "--json")
    found = evla(*given, "--framing", "deploy")
    assert not found.status, found.err
    expected = policy.predict_action(frame, "open drawer", framing="deploy")
    np.testing.assert_allclose(json.loads(found.out)["actions"], expected, atol=1e-6)
    assert "Invalid value for '--framing'" in evla(*given, "--framing", "square").message


def test_the_same_seed_gives_the_same_actions_and_the_default_is_0(policy: RuntimePolicy, frame: Image.Image) -> None:
    first = policy.predict_action(frame, "open drawer")
    assert np.array_equal(first, policy.predict_action(frame, "open drawer", seed=0))
    assert policy.predict_action(frame, "open drawer", "toy").tolist() == first.tolist()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("image", np.zeros((1, SIDE, SIDE, 3), np.float32), r"image is float32.*expected a numpy array uint8"),
        ("image", np.zeros((1, 3, SIDE, SIDE), np.uint8), r"image is uint8\[1, 3, 28, 28\]"),
        ("input_ids", np.zeros((1, TEXT), np.int32), r"input_ids is int32"),
        ("input_ids", np.zeros((1, TEXT + 1), np.int64), r"input_ids is int64\[1, 21\].*\[1, 20\]"),
        ("input_ids", np.full((1, TEXT), -1), "input_ids has ids from -1 to -1: expected from 0 to 32063"),
        ("input_ids", np.full((1, TEXT), VOCABULARY), "input_ids has ids from 32064 to 32064"),
        ("text_length", np.array(7), r"text_length is int64\[\]"),
        ("text_length", [7], "text_length is list"),
        ("text_length", np.array([1]), r"text_length=\[1\]: expected from 2 to 20"),
        ("text_length", np.array([TEXT + 1]), r"text_length=\[21\]: expected from 2 to 20"),
        ("noise", np.zeros((CHUNK, WIDTH), np.float32), r"noise is float32\[16, 7\]"),
        ("noise", np.zeros((1, CHUNK, WIDTH)), r"noise is float64"),
    ],
)
def test_an_input_of_another_dtype_shape_or_range_is_refused(
    policy: RuntimePolicy, inputs: dict[str, NDArray[Any]], name: str, given: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        policy.sample(**(inputs | {name: given}))


# Loading


@pytest.mark.parametrize(
    ("target", "given"),
    [("policy", "policy/model.onnx"), ("x.onnx", "x.onnx"), ("x.onnx", "x.manifest.json")],
)
def test_a_policy_is_loaded_by_any_of_its_names(
    tmp_path: Path, tokenizer_json: str, inputs: dict[str, NDArray[Any]], target: str, given: str
) -> None:
    export(tmp_path / target, tokenizer_json)
    policy = load(str(tmp_path / given))
    assert policy.sample(**inputs).shape == (1, CHUNK, WIDTH)
    assert policy.manifest == read_manifest(find_manifest(tmp_path / given))
    assert policy.config == CompileConfig.dense(text_tokens=TEXT)


def test_a_moved_artifact_still_loads(tmp_path: Path, tokenizer_json: str, inputs: dict[str, NDArray[Any]]) -> None:
    export(tmp_path / "policy", tokenizer_json).rename(tmp_path / "moved")
    assert load(tmp_path / "moved").sample(**inputs).shape == (1, CHUNK, WIDTH)


def test_an_artifact_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no compiled policy"):
        load(tmp_path / "policy")


def test_a_changed_file_is_refused_unless_hashes_are_left_out(tmp_path: Path, tokenizer_json: str) -> None:
    folder = export(tmp_path / "policy", tokenizer_json)
    (folder / "report.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"report\.json has the SHA-256"):
        load(folder)
    assert load(folder, check_hashes=False).config.text_tokens == TEXT


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            toy_graph("batch"),
            r"inputs of the graph are .*image uint8\['batch', 28, 28, 3\].*expected .*\[1, 28, 28, 3\]",
        ),
        (toy_graph(chunk=8), r"inputs of the graph are .*noise float32\[1, 8, 7\].*expected .*\[1, 16, 7\]"),
        (toy_graph(dtype=TensorProto.DOUBLE), r"outputs of the graph are .*samples float64.*expected .*float32"),
        (toy_graph(dtype=TensorProto.BFLOAT16), r"outputs of the graph are .*samples tensor\(bfloat16\)"),
        (toy_graph(samples="actions"), r"outputs of the graph are actions .*expected .*samples"),
    ],
)
def test_a_graph_that_is_not_the_manifest_s_is_refused(
    tmp_path: Path, tokenizer_json: str, graph: onnx.ModelProto, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(export(tmp_path / "policy", tokenizer_json, graph=graph))


def test_a_file_that_is_no_onnx_graph_is_refused(tmp_path: Path, tokenizer_json: str) -> None:
    folder = export(tmp_path / "policy", tokenizer_json)
    (folder / "model.onnx").write_bytes(b"no graph")
    remeasure(folder)
    with pytest.raises(ArtifactError, match=r"model\.onnx is no ONNX file"):
        load(folder)


@pytest.mark.parametrize("other", ["hidden.bin", "../hidden.bin"])
def test_weights_in_a_file_that_nobody_hashes_are_refused(tmp_path: Path, tokenizer_json: str, other: str) -> None:
    folder = export(tmp_path / "policy", tokenizer_json)
    shutil.copy(folder / "model.onnx.data", folder / other)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = other if entry.key == "location" else entry.value
    onnx.save(model, folder / "model.onnx")
    remeasure(folder)
    with pytest.raises(
        ArtifactError, match=r"keeps weights in \['.*hidden\.bin'\], its manifest lists \['model.onnx.data'\]"
    ):
        load(folder)


@pytest.mark.parametrize("name", [b"lengths", b"text_length"])
def test_a_name_that_is_no_text_is_refused(tmp_path: Path, tokenizer_json: str, name: bytes) -> None:
    folder = export(tmp_path / "policy", tokenizer_json)
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data.replace(name, b"\xff" * len(name)))
    remeasure(folder)
    with pytest.raises(ArtifactError, match=r"model\.onnx: a name in it is no UTF-8 text"):
        load(folder)


def test_a_graph_without_its_external_data_is_refused(tmp_path: Path, tokenizer_json: str) -> None:
    folder = export(tmp_path / "policy", tokenizer_json)
    (folder / "model.onnx.data").unlink()
    remeasure(folder, lambda manifest: replace(manifest, parts=(replace(manifest.parts[0], data=()),)))
    with pytest.raises(ArtifactError, match=r"keeps weights in \['model\.onnx\.data'\], its manifest lists \[\]"):
        load(folder)


def test_every_opset_that_is_written_states_its_oldest_runtime() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (comment,) = re.findall(r"((?:^# .*\n)+)cpu = ", text, re.MULTILINE)
    stated = {int(opset): version for version, opset in re.findall(r"(1\.\d+) for (?:opset )?(\d+)", comment)}
    assert stated == {opset: f"{major}.{minor}" for opset, (major, minor) in onnx_versions.OLDEST_RUNTIME.items()}


@pytest.mark.parametrize(
    ("version", "opset", "advice"),
    [
        ("1.16.3", 23, r"opset 23 needs 1\.23 or newer: pip install --upgrade onnxruntime, or export with opset=19 \("),
        ("1.22.1", 23, r"opset 23 needs 1\.23 or newer.*, or export with opset=22 \(evla compile --opset 22\)$"),
        ("1.9.0", 18, r"opset 18 needs 1\.15 or newer: pip install --upgrade onnxruntime$"),
        ("1.23.0", 23, r"another opset would not help"),
        ("1.32.0.dev1", 23, r"another opset would not help"),
        ("1.32.0", 24, r"another opset would not help"),
    ],
)
def test_a_lower_opset_is_advised_only_where_it_helps(version: str, opset: int, advice: str) -> None:
    assert re.search(advice, onnx_versions.refusal_advice(version, opset))


def test_a_file_of_another_ir_version_is_refused_with_advice(tmp_path: Path, tokenizer_json: str) -> None:
    graph = toy_graph()
    graph.ir_version = 99
    with pytest.raises(
        ArtifactError, match=r"cannot load .*model\.onnx: .*this version runs opset 20, so another opset"
    ):
        load(export(tmp_path / "policy", tokenizer_json, graph=graph))


def test_an_upgrade_is_of_the_package_that_brings_the_provider(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise onnxruntime.capi.onnxruntime_pybind11_state.Fail("Opset 20 is under development")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    monkeypatch.setattr(onnxruntime, "__version__", "1.16.3")
    with pytest.raises(
        ArtifactError, match=r"opset 20 needs 1\.17 or newer: pip install --upgrade onnxruntime-gpu, or"
    ):
        load(artifact, "cuda")


@pytest.mark.parametrize(("text", "message"), [(b"{}", "cannot be parsed"), (b"\xff", "decode")])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, tokenizer_json: str, text: bytes, message: str) -> None:
    folder = export(tmp_path / "policy", tokenizer_json)
    (folder / "tokenizer.json").write_bytes(text)
    remeasure(folder)
    with pytest.raises(ArtifactError, match=rf"tokenizer .*tokenizer\.json: .*{message}"):
        load(folder)


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(tmp_path: Path, tokenizer_json: str) -> None:
    folder = export(tmp_path / "policy", tokenizer_json)
    remeasure(folder, lambda manifest: replace(manifest, vocabulary=32000))
    assert load(folder).processor.largest_id == 31999
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"]["far"] = 40_000  # ids with a gap: the number of pieces is 32001 only
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    remeasure(folder)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: it has ids up to 40000.*embedding has 32000 rows"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"provider": "tpu"}, "provider='tpu': expected one of cpu, cuda"),
        ({"threads": 0}, "threads=0"),
        ({"threads": True}, "threads=True"),
        ({"threads": 1.5}, "threads=1.5"),
        ({"allow_cpu": True}, "allow_cpu=True with provider='cpu'"),
        ({"mapped": True, "provider": "cuda"}, "mapped=True with provider='cuda'"),
    ],
)
def test_a_setting_out_of_range_is_refused(artifact: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(artifact, **settings)


def test_the_framing_reaches_the_graph(policy: RuntimePolicy, frame: Image.Image) -> None:
    cut = policy.processor.image(frame, "deploy")
    deployed = policy.predict_action(frame, "open drawer", framing="deploy")
    assert np.array_equal(deployed, policy.predict_action(cut, "open drawer"))
    assert not np.array_equal(deployed, policy.predict_action(frame, "open drawer"))


def test_the_number_of_threads_reaches_onnx_runtime(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = onnxruntime.InferenceSession

    def recording(model: Path, options: Any, **settings: Any) -> Any:
        opened.append(options.intra_op_num_threads)
        return original(model, options, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
    load(artifact, threads=np.int64(1))  # type: ignore[arg-type]  # numpy's integer, on purpose
    load(artifact)
    assert opened == [1, onnxruntime.SessionOptions().intra_op_num_threads]


def test_a_policy_larger_than_memory_runs_mapped_alone(
    artifact: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "available_memory", lambda: 100)
    with pytest.raises(
        EvlaError, match=r"model\.onnx has .* of weights, .* 100 B of memory are free: load it with map"
    ):
        load(artifact)
    mapped = load(artifact, mapped=True)
    monkeypatch.undo()
    assert np.array_equal(mapped.sample(**inputs), load(artifact).sample(**inputs))


@pytest.mark.parametrize(("provider", "extra"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_without_onnx_runtime_the_extra_to_install_is_named(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, provider: Any, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EvlaError, match=rf'pip install "evla-compile\[{extra}\]"'):
        load(artifact, provider)


def test_a_provider_that_onnx_runtime_lacks_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EvlaError, match=r"expected CUDAExecutionProvider, but .* CPUExecutionProvider: .*\[gpu\]"):
        load(artifact, "cuda")


def test_a_session_that_falls_back_to_the_cpu_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []

    def on_cpu(*_: object, **settings: Any) -> SimpleNamespace:
        opened.append(settings)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    with pytest.raises(EvlaError, match=r"expected CUDAExecutionProvider, but .* took CPUExecutionProvider"):
        load(artifact, "cuda")
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"})]
    assert opened == [{"providers": providers, "enable_fallback": 0, "disabled_optimizers": []}]


@pytest.mark.parametrize(
    ("provider", "settings", "expected"),
    [
        (
            "tensorrt",
            {"cache": "engines"},
            [
                (
                    "TensorrtExecutionProvider",
                    {
                        "trt_fp16_enable": "0",
                        "trt_int8_enable": "0",
                        "trt_engine_cache_enable": "1",
                        "trt_engine_cache_path": "engines",
                        "trt_timing_cache_enable": "1",
                        "trt_timing_cache_path": "engines",
                    },
                ),
                ("CUDAExecutionProvider", {"use_tf32": "0"}),
            ],
        ),
        ("openvino", {}, [("OpenVINOExecutionProvider", {"device_type": "CPU", "precision": "ACCURACY"})]),
    ],
)
def test_a_provider_is_asked_for_with_its_settings(
    provider: Any,
    settings: dict[str, Any],
    expected: list[Any],
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Any] = []

    def refuse(*_: object, providers: list[Any], **others: Any) -> SimpleNamespace:
        opened.extend(providers)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name for name, _ in expected])
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(EvlaError, match=f"provider='{provider}': expected {expected[0][0]}, but .* took CPUExecution"):
        load(artifact, provider, **settings)
    assert opened == expected
    assert (tmp_path / "engines").is_dir() == ("cache" in settings)


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ("cuda", r"expected CUDAExecutionProvider, .*evla-compile\[gpu\]"),
        ("tensorrt", r"expected TensorrtExecutionProvider, .*evla-compile\[gpu\]"),
        ("openvino", r"expected OpenVINOExecutionProvider, .*evla-compile\[openvino\]"),
    ],
)
def test_a_provider_that_is_not_installed_is_named_with_its_extra(provider: Any, message: str, artifact: Path) -> None:
    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("this ONNX Runtime has more providers than a CPU's")
    with pytest.raises(EvlaError, match=message):
        load(artifact, provider)


def test_a_cache_is_for_what_builds_something(artifact: Path) -> None:
    with pytest.raises(ValueError, match="with provider='cpu', which builds nothing worth keeping"):
        load(artifact, "cpu", cache="engines")


# Without torch

RUN = """
import importlib.util, json, sys
import numpy as np
from evla_compile import runtime
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("transformers") is None
policy = runtime.load(sys.argv[1])
noise = np.full((16, 7), 0.1, dtype=np.float32)
print(json.dumps(policy.predict_action(np.full((6, 8, 3), 9, dtype=np.uint8), "open drawer", noise=noise).tolist()))
"""


def test_importing_the_runtime_imports_neither_torch_nor_transformers_nor_onnx_runtime() -> None:
    code = "import sys, evla_compile.runtime; print({name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'numpy'" in loaded
    assert not [name for name in ("torch", "transformers", "onnx", "onnxruntime") if f"'{name}'" in loaded]


def test_the_runtime_works_in_an_environment_that_has_no_torch(
    tmp_path: Path, artifact: Path, policy: RuntimePolicy
) -> None:
    environment = tmp_path / "environment"
    venv.EnvBuilder(symlinks=True).create(environment)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "PIL", "pillow.libs", "tokenizers", "onnxruntime"):
        (site_packages / name).symlink_to(installed / name)
    (site_packages / "evla_compile").symlink_to(Path(evla_compile.__file__).parent)
    command = [str(environment / "bin" / "python"), "-I", "-c", RUN, str(artifact)]
    actions = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    noise = np.full((CHUNK, WIDTH), 0.1, dtype=np.float32)
    assert actions == policy.predict_action(np.full((6, 8, 3), 9, dtype=np.uint8), "open drawer", noise=noise).tolist()


@pytest.mark.parametrize("name", evla_compile.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(evla_compile, name) is not None
    assert name in dir(evla_compile)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'evla_compile' has no attribute 'decompile'"):
        getattr(evla_compile, "decompile")  # noqa: B009  mypy knows that the name is not there


# bfloat16


@pytest.fixture(scope="module")
def bfloat16_artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    folder = export(tmp_path_factory.mktemp("bfloat16") / "policy", tokenizer_json, graph=bfloat16_graph())
    remeasure(folder, lambda manifest: replace(manifest, precision="bfloat16"))
    return folder


@pytest.mark.parametrize("mapped", [False, True])
def test_bfloat16_runs_on_a_cpu_in_float32_arithmetic_and_says_so(
    mapped: bool, bfloat16_artifact: Path, inputs: dict[str, NDArray[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        policy = load(bfloat16_artifact, mapped=mapped)
    assert policy.widened
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "it runs in float32 arithmetic" in caplog.text
    expected = inputs["noise"] * narrow(GAIN) + (51 + 7) / 255 + 50 * TEXT / 1e6
    np.testing.assert_allclose(policy.sample(**inputs), expected, rtol=1e-6)  # bfloat16 rounds to 4e-3


def test_bfloat16_weights_behind_links_are_found(
    bfloat16_artifact: Path, tmp_path: Path, inputs: dict[str, NDArray[Any]]
) -> None:
    """Hugging Face's cache: `snapshots/REVISION/NAME` is a link to `blobs/HASH`."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in bfloat16_artifact.iterdir():
        (blobs / f"of-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"of-{file.name}")
    assert np.array_equal(load(snapshot).sample(**inputs), load(bfloat16_artifact).sample(**inputs))


def test_a_float32_policy_is_not_said_to_be_widened(policy: RuntimePolicy) -> None:
    assert not policy.widened


def test_bfloat16_weights_stay_narrow_where_they_are_mapped_alone(
    bfloat16_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folded constants would be a float32 copy of every weight."""
    opened = []
    original = onnxruntime.InferenceSession

    def recording(model: bytes, options: Any, **settings: Any) -> Any:
        opened.append(settings["disabled_optimizers"])
        return original(model, options, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording)
    load(bfloat16_artifact)
    load(bfloat16_artifact, mapped=True)
    assert opened == [["MatMulAddFusion"], ["MatMulAddFusion", "ConstantFolding"]]


def test_bfloat16_takes_twice_its_weights_on_a_cpu(bfloat16_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (part,) = read_manifest(bfloat16_artifact / "manifest.json").parts
    size = sum(record.size for record in part.files)
    monkeypatch.setattr(onnx_session, "available_memory", lambda: 2 * size - 1)
    with pytest.raises(EvlaError, match="load it with mapped=True"):
        load(bfloat16_artifact)
    monkeypatch.setattr(onnx_session, "available_memory", lambda: 2 * size)
    load(bfloat16_artifact)


def test_without_onnx_bfloat16_on_a_cpu_says_what_to_install(
    bfloat16_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EvlaError, match=r"is a bfloat16 graph, .*: pip install onnx, or export it with precision='flo"):
        load(bfloat16_artifact)


def test_a_file_that_is_no_graph_cannot_be_widened(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"model\.onnx cannot be read"):
        read_widened(tmp_path / "model.onnx")


def test_a_provider_without_bfloat16_is_refused_with_the_precision_and_what_has_it(
    bfloat16_artifact: Path, remote: str
) -> None:
    with pytest.raises(
        ArtifactError, match=r"it is of bfloat16, which openvino may lack: take provider='cpu', .*newer ONNX Runtime$"
    ):
        load(bfloat16_artifact, "openvino", allow_cpu=True)


# Operators that a provider leaves to the CPU


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> str:
    """A real provider other than the CPU's, which takes no operator at all: every package of ONNX Runtime has it."""
    name = "AzureExecutionProvider"
    if name not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {name}")
    row = replace(PROVIDERS["openvino"], name=name, options={})
    monkeypatch.setattr(onnx_session, "PROVIDERS", {**PROVIDERS, "openvino": row})
    return name


def test_operators_that_fall_back_to_the_cpu_are_refused_by_name(artifact: Path, remote: str) -> None:
    message = r"provider='openvino': .* puts 14 of 14 operators of .*model\.onnx on the CPU: \S* \(Cast\), "
    with pytest.raises(EvlaError, match=message + r".* and 9 more; export with opset=20.*allow_cpu=True, or evla run"):
        load(artifact, "openvino")


def test_operators_may_run_on_the_cpu_and_are_named_where_that_is_asked_for(
    artifact: Path, remote: str, inputs: dict[str, NDArray[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        policy = load(artifact, "openvino", allow_cpu=True)
    assert "puts 14 of 14 operators of" in caplog.text
    assert np.array_equal(policy.sample(**inputs), load(artifact).sample(**inputs))


def test_an_older_onnx_runtime_refuses_to_fall_back_without_naming_operators(
    artifact: Path, remote: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "get_provider_graph_assignment_info"
    monkeypatch.delattr(next(kind for kind in onnxruntime.InferenceSession.__mro__ if name in vars(kind)), name)
    with pytest.raises(EvlaError, match=r"puts operators of .*model\.onnx on the CPU, which a newer one would name"):
        load(artifact, "openvino")
    with caplog.at_level("WARNING"):
        load(artifact, "openvino", allow_cpu=True)
    assert "does not say which operators" in caplog.text


def test_the_cpu_itself_is_asked_for_and_nothing_is_reported(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        load(artifact)
    assert not caplog.records


# The table of providers


def test_every_provider_is_installed_by_the_extra_that_its_row_names() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"engine", *PROVIDERS} == set(get_args(Provider))
    for row in PROVIDERS.values():
        (installed,) = project["optional-dependencies"][row.extra]
        oldest = ".".join(map(str, min(onnx_versions.OLDEST_RUNTIME.values())))
        assert installed == f"{row.package}>={oldest}"
        assert f"[{row.extra}]" in row.remedy

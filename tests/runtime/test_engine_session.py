"""The TensorRT session's host logic, against a recorded fake of TensorRT and CUDA; on a GPU, against the real ones."""

import json
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import evla_compile as evla
from evla_compile.artifact.cases import read_cases
from evla_compile.artifact.manifest import Manifest, read_manifest, write_manifest
from evla_compile.artifact.records import EngineRecord, FileRecord, Part, TensorSpec
from evla_compile.errors import ArtifactError, EvlaError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.processor import ActionStatistics
from evla_compile.runtime import load
from evla_compile.runtime.engine_match import build_command, check_match
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.engine_settings import EngineSettings
from evla_compile.settings.plan import Plan
from evla_compile.tensorrt.cuda import Gpu, find_gpu
from evla_compile.tensorrt.library import find_flavour
from tests.runtime.fake_tensorrt import VERSION, FakeGpu, FakeTensorRT, fake_engine

PLATFORM = f"{platform.system()}-{platform.machine()}".lower()
INPUTS = (
    TensorSpec(name="image", dtype="uint8", shape=(1, 28, 28, 3)),
    TensorSpec(name="input_ids", dtype="int64", shape=(1, 20)),
    TensorSpec(name="text_length", dtype="int64", shape=(1,)),
    TensorSpec(name="noise", dtype="float32", shape=(1, 16, 7)),
)
COGNITION = TensorSpec(name="cognition", dtype="float32", shape=(1, 1, 4))
SAMPLES = TensorSpec(name="samples", dtype="float32", shape=(1, 16, 7))
PARTS = {
    "perception": (INPUTS[:3], (COGNITION,)),
    "action": ((INPUTS[3], COGNITION), (SAMPLES,)),
}
FAKE_DTYPES = {"uint8": "UINT8", "int64": "INT64", "float32": "FLOAT"}
RECORD = EngineRecord(
    flavour="tensorrt",
    version=VERSION,
    files=(),
    layers=(3, 2),
    platform=PLATFORM,
    gpu="Fake RTX",
    gpu_processors=24,
    gpu_memory_bytes=24_000,
    compute_capabilities=("8.9",),
    hardware_compatible=False,
    version_compatible=False,
)
OF_RTX: dict[str, Any] = {
    "flavour": "tensorrt_rtx",
    "version": "1.7.1.116",
    "gpu": None,
    "gpu_processors": None,
    "gpu_memory_bytes": None,
}
ORIN = Gpu(name="Orin", compute_capability="8.7", memory_bytes=64_300_000_000, processors=16, driver_version="13.2")


def write(folder: Path, record: EngineRecord, tokenizer_json: str, contents: dict[str, bytes] | None = None) -> Path:
    """Write an artifact of two engines, without the ONNX files that they were built from; return its folder."""
    folder.mkdir()
    for name, text in (("tokenizer.json", tokenizer_json), ("report.json", "{}"), ("cases.npz", "")):
        (folder / name).write_text(text, encoding="utf-8")
    engines, parts = [], []
    for name, (inputs, outputs) in PARTS.items():
        tensors = [(spec, True) for spec in inputs] + [(spec, False) for spec in outputs]
        described = [(s.name, FAKE_DTYPES[s.dtype], s.shape, given) for s, given in reversed(tensors)]
        data = fake_engine(name, described, host_code=record.version_compatible)
        file = folder / f"model.{name}.engine"
        file.write_bytes((contents or {}).get(name, data))
        engines.append(FileRecord.measure(file))
        model = FileRecord(name=f"model.{name}.onnx", sha256="0" * 64, size=1)
        parts.append(Part(name=name, model=model, data=(), inputs=inputs, outputs=outputs))
    manifest = Manifest(
        created_by="0.0.0",
        parts=tuple(parts),
        engine=replace(record, files=tuple(engines)),
        precision="float32",
        tokenizer=FileRecord.measure(folder / "tokenizer.json"),
        report=FileRecord.measure(folder / "report.json"),
        cases=FileRecord.measure(folder / "cases.npz"),
        inputs=INPUTS,
        outputs=(SAMPLES,),
        config=CompileConfig.dense(text_tokens=20),
        plan=Plan(decisions=(LayerDecision(keep=(0,)),)),
        statistics={"toy": ActionStatistics(low=(-1.0,) * 7, high=(1.0,) * 7, mask=(True,) * 6 + (False,))},
        vocabulary=32064,
        pad_id=3,
        opset=23,
        versions={},
    )
    write_manifest(manifest, folder / "manifest.json")
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The fake, in the place of cuda-bindings, TensorRT and TensorRT-RTX."""
    fake = FakeGpu()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake.runtime())
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(fake))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRT(fake, "1.7.1.116"))
    return fake


@pytest.fixture
def artifact(tmp_path: Path, tokenizer_json: str) -> Path:
    return write(tmp_path / "policy", RECORD, tokenizer_json)


@pytest.fixture
def feeds() -> dict[str, NDArray[Any]]:
    return {
        "image": np.full((1, 28, 28, 3), 1, dtype=np.uint8),
        "input_ids": np.full((1, 20), 2, dtype=np.int64),
        "text_length": np.array([7]),
        "noise": np.full((1, 16, 7), 0.5, dtype=np.float32),
    }


def expected(feeds: dict[str, NDArray[Any]]) -> float:
    """What the two toy engines make of it: each adds 1 to the sum of what it reads."""
    cognition = 1.0 + sum(float(feeds[name].sum()) for name in ("image", "input_ids", "text_length"))
    return 1.0 + float(feeds["noise"].sum()) + COGNITION.shape[-1] * cognition


# Running


def test_a_chain_of_engines_runs_and_hands_tensors_over_on_the_gpu(
    gpu: FakeGpu, artifact: Path, feeds: dict[str, NDArray[Any]]
) -> None:
    policy = load(artifact, "engine")
    gpu.log.clear()
    samples = policy.sample(**feeds)
    assert np.all(samples == expected(feeds))
    assert gpu.log == [
        "copy in 2352",
        "copy in 160",
        "copy in 8",
        "copy in 448",
        "execute perception",
        "execute action",
        "copy out 448",
        "synchronize",
    ]


def test_every_tensor_has_one_buffer_of_its_size_bound_by_name(gpu: FakeGpu, artifact: Path) -> None:
    policy = load(artifact, "engine")
    assert gpu.log == [
        "create stream",
        "load perception",
        "load action",
        *("allocate 2352", "allocate 160", "allocate 8", "allocate 16", "allocate 448", "allocate 448"),
        *("bind perception image", "bind perception input_ids", "bind perception text_length"),
        *("bind perception cognition", "bind action noise", "bind action cognition", "bind action samples"),
    ]
    policy.close()
    assert not gpu.memory


def test_results_are_not_overwritten_by_the_next_call(
    gpu: FakeGpu, artifact: Path, feeds: dict[str, NDArray[Any]]
) -> None:
    policy = load(artifact, "engine")
    first = policy.sample(**feeds)
    policy.sample(**(feeds | {"noise": feeds["noise"] + 1}))
    assert np.all(first == expected(feeds))


def test_an_engine_file_is_loaded_by_its_own_name_without_the_graphs(gpu: FakeGpu, artifact: Path) -> None:
    (artifact / "manifest.json").rename(artifact / "policy.manifest.json")
    assert load(artifact / "policy.engine").manifest.engine is not None
    assert not list(artifact.glob("*.onnx"))


def test_actions_come_out_of_frames_and_their_time_is_counted(gpu: FakeGpu, artifact: Path) -> None:
    policy = load(artifact, "engine")
    frame = np.zeros((28, 28, 3), dtype=np.uint8)
    for _ in range(3):
        assert policy.predict_action(frame, "open it").shape == (16, 7)
    assert [(summary.kind, summary.count) for summary in policy.latency.summary()] == [("graph", 2), ("call", 2)]


# CUDA graphs


def test_a_cuda_graph_is_captured_once_and_then_launched(
    gpu: FakeGpu, artifact: Path, feeds: dict[str, NDArray[Any]]
) -> None:
    policy = load(artifact, "engine", cuda_graph=True)
    captured = gpu.log[gpu.log.index("bind action samples") + 1 :]
    gpu.log.clear()
    for step in range(3):
        changed = feeds | {"noise": feeds["noise"] + np.float32(step)}
        assert np.all(policy.sample(**changed) == expected(changed)), step
    work = [
        *("copy in 2352", "copy in 160", "copy in 8", "copy in 448"),
        *("execute perception", "execute action", "copy out 448"),
    ]
    assert captured == [*work, "synchronize", "begin capture", *work, "end capture", "destroy recording"]
    assert gpu.log == ["launch", "synchronize"] * 3


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_the_graph_goes_before_its_contexts_and_these_before_their_engines(
    cuda_graph: bool, gpu: FakeGpu, artifact: Path, feeds: dict[str, NDArray[Any]]
) -> None:
    policy = load(artifact, "engine", cuda_graph=cuda_graph)
    policy.sample(**feeds)
    gpu.log.clear()
    policy.close()
    assert gpu.log == [
        "synchronize",
        *(["destroy graph"] if cuda_graph else []),
        *("destroy context action", "destroy context perception"),
        *("destroy engine action", "destroy engine perception"),
        *["free"] * 6,
        *["free pinned"] * 5,
        "destroy stream",
    ]
    gpu.log.clear()
    policy.close()
    assert gpu.log == []
    with pytest.raises(EvlaError, match="this policy is closed"):
        policy.sample(**feeds)


def test_a_policy_that_is_let_go_of_gives_everything_back(gpu: FakeGpu, artifact: Path) -> None:
    policy = load(artifact, "engine")
    del policy
    assert not gpu.memory
    assert gpu.log[-1] == "destroy stream"


def test_an_engine_that_cannot_be_captured_is_refused_when_it_is_loaded(gpu: FakeGpu, artifact: Path) -> None:
    gpu.capturable = False
    with pytest.raises(EvlaError, match="cuda_graph=True: an engine of this artifact cannot be captured"):
        load(artifact, "engine", cuda_graph=True)
    assert not gpu.memory
    load(artifact, "engine")


@pytest.mark.parametrize("failing", ["capture action", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails_leaves_no_stream_capturing_and_loses_no_result(
    failing: str, gpu: FakeGpu, artifact: Path, feeds: dict[str, NDArray[Any]]
) -> None:
    """It happens when the policy is loaded, before any result depends on it."""
    gpu.failing = failing
    with pytest.raises(EvlaError, match=r"cuda_graph=True: the engines cannot be captured \(.*; load them without"):
        load(artifact, "engine", cuda_graph=True)
    if failing != "cudaStreamEndCapture":
        assert gpu.log.index("end capture") < gpu.log.index("destroy recording") < gpu.log.index("destroy stream")
    assert not gpu.memory
    gpu.failing, gpu.capturing = None, None
    assert np.all(load(artifact, "engine").sample(**feeds) == expected(feeds))


def test_the_call_before_a_capture_has_inputs_that_every_policy_takes(gpu: FakeGpu, artifact: Path) -> None:
    policy = load(artifact, "engine", cuda_graph=True)
    seen = next(contents for contents in gpu.memory.values() if contents.size == 8)  # text_length int64 [1]
    assert seen.view(np.int64).tolist() == [2]
    policy.close()


# Threads and failures


def test_threads_share_a_session_and_each_gets_its_own_result(
    gpu: FakeGpu, artifact: Path, feeds: dict[str, NDArray[Any]]
) -> None:
    policy = load(artifact, "engine")
    gpu.wait = 0.003

    def call(step: int) -> bool:
        own = feeds | {"noise": feeds["noise"] + np.float32(step)}
        return bool(np.all(policy.sample(**own) == expected(own)))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(call, range(20)))
    assert policy.latency.summary()[0].count == 19


def test_a_session_is_closed_only_when_the_call_of_another_thread_is_done(
    gpu: FakeGpu, artifact: Path, feeds: dict[str, NDArray[Any]]
) -> None:
    policy = load(artifact, "engine")
    gpu.wait = 0.05
    with ThreadPoolExecutor(1) as threads:
        gpu.log.clear()
        running = threads.submit(policy.sample, **feeds)
        while "synchronize" not in gpu.log:
            sleep(0.001)
        policy.close()
        assert np.all(running.result() == expected(feeds))


def test_what_an_earlier_engine_still_does_is_waited_for_when_a_later_one_fails(
    gpu: FakeGpu, artifact: Path, feeds: dict[str, NDArray[Any]]
) -> None:
    policy = load(artifact, "engine")
    gpu.log.clear()
    gpu.failing = "execute action"
    with pytest.raises(EvlaError, match="TensorRT failed to run action"):
        policy.sample(**feeds)
    assert gpu.log[-3:] == ["execute perception", "execute action", "synchronize"]
    gpu.failing = None
    assert np.all(policy.sample(**feeds) == expected(feeds))


def test_a_stream_that_fails_does_not_keep_the_rest_from_being_given_back(gpu: FakeGpu, artifact: Path) -> None:
    policy = load(artifact, "engine")
    gpu.failing = "cudaStreamSynchronize"
    with pytest.raises(EvlaError, match="cudaStreamSynchronize failed"):
        policy.close()
    assert not gpu.memory
    assert gpu.log[-1] == "destroy stream"


def test_a_buffer_that_tensorrt_does_not_take_is_an_error(gpu: FakeGpu, artifact: Path) -> None:
    gpu.refusing = "cognition"
    with pytest.raises(EvlaError, match=r"TensorRT does not take the buffer of cognition float32\[1, 1, 4\] for perc"):
        load(artifact, "engine")
    assert not gpu.memory


# Kernels of TensorRT-RTX


def test_kernels_that_tensorrt_rtx_compiles_are_kept(gpu: FakeGpu, tmp_path: Path, tokenizer_json: str) -> None:
    record = replace(RECORD, **OF_RTX)
    folder = write(tmp_path / "policy", record, tokenizer_json)
    load(folder, "engine", cache=tmp_path).close()
    kept = tmp_path / "model.action.engine.kernels"
    assert kept.read_bytes() == b"kernel"
    load(folder, "engine", cache=tmp_path).close()
    assert kept.read_bytes() == b"kernelkernel"
    assert "read kernels 6" in gpu.log


def test_the_folder_for_kernels_is_made(gpu: FakeGpu, tmp_path: Path, tokenizer_json: str) -> None:
    folder = write(tmp_path / "policy", replace(RECORD, **OF_RTX), tokenizer_json)
    load(folder, "engine", cache=tmp_path / "robot" / "kernels").close()
    assert (tmp_path / "robot" / "kernels" / "model.action.engine.kernels").read_bytes() == b"kernel"


def test_a_folder_for_kernels_that_cannot_be_made_is_refused_at_once(
    gpu: FakeGpu, tmp_path: Path, tokenizer_json: str
) -> None:
    folder = write(tmp_path / "policy", replace(RECORD, **OF_RTX), tokenizer_json)
    with pytest.raises(EvlaError, match=r"cache=.*manifest\.json/kernels cannot be created: .*name a folder"):
        load(folder, "engine", cache=folder / "manifest.json" / "kernels")
    assert gpu.log == []


def test_kernels_that_are_refused_are_reported_and_replaced(
    gpu: FakeGpu, tmp_path: Path, tokenizer_json: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "policy", replace(RECORD, **OF_RTX), tokenizer_json)
    kept = tmp_path / "model.action.engine.kernels"
    kept.write_bytes(b"of another driver")
    gpu.refusing = "kernels"
    with caplog.at_level("WARNING"):
        policy = load(folder, "engine", cache=tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"TensorRT-RTX refuses the kernels in {kept}" in caplog.text
    policy.close()
    assert kept.read_bytes() == b"kernel"


@pytest.mark.parametrize("refusing", ["create_runtime_cache", "set_runtime_cache"])
def test_a_library_that_keeps_no_kernels_is_not_taken_for_one_that_does(
    refusing: str, gpu: FakeGpu, tmp_path: Path, tokenizer_json: str
) -> None:
    folder = write(tmp_path / "policy", replace(RECORD, **OF_RTX), tokenizer_json)
    gpu.refusing = refusing
    with pytest.raises(EvlaError, match=r"a cache of kernels for .*load the policy without cache="):
        load(folder, "engine", cache=tmp_path)
    assert not gpu.memory


def test_kernels_that_cannot_be_kept_are_an_error_after_all_else_is_given_back(
    gpu: FakeGpu, tmp_path: Path, tokenizer_json: str
) -> None:
    folder = write(tmp_path / "policy", replace(RECORD, **OF_RTX), tokenizer_json)
    policy = load(folder, "engine", cache=tmp_path / "kernels")
    (tmp_path / "kernels").rmdir()
    with pytest.raises(EvlaError, match=r"kernels cannot be kept in .*perception\.engine\.kernels"):
        policy.close()
    assert gpu.log[-1] == "destroy stream"


# Refusals


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [
        ("10.3.0", "10.3.0", True),
        ("10.3.0", "10.13.0", True),
        ("10.13.0", "11.1.0", True),
        ("10.14.0", "10.13.0", False),
        ("11.0.0", "10.13.0", False),
        ("10.3.0", "12.0.0", False),
        ("11.0.0", "12.0.0", False),
    ],
)
def test_a_version_compatible_engine_runs_on_the_versions_that_nvidia_lists(built: str, here: str, runs: bool) -> None:
    record = replace(RECORD, version=built, version_compatible=True)
    gpu = Gpu(name="Fake RTX", compute_capability="8.9", memory_bytes=24_000, processors=24, driver_version="13.0")
    if runs:
        check_match(record, here, gpu, Path("policy/manifest.json"))
    else:
        with pytest.raises(ArtifactError, match=f"built by TensorRT {built}, and {here} is installed"):
            check_match(record, here, gpu, Path("policy/manifest.json"))


@pytest.mark.parametrize("version_compatible", [True, False])
def test_only_a_version_compatible_engine_may_bring_host_code(
    version_compatible: bool, gpu: FakeGpu, tmp_path: Path, tokenizer_json: str
) -> None:
    record = replace(RECORD, version_compatible=version_compatible)
    load(write(tmp_path / "policy", record, tokenizer_json), "engine")
    assert gpu.host_code_allowed is version_compatible


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"processors": 8},
            r" 8\.7 with 16 multi.* 64\.3 GB, and this is Orin, 8\.7 with 8 multiprocessors",
        ),
        (
            {"memory_bytes": 30_600_000_000},
            r" 64\.3 GB, and this is Orin, 8\.7 with 16 multiprocessors and 30\.6 GB",
        ),
    ],
)
def test_an_engine_of_an_agx_orin_is_not_taken_for_one_of_an_orin_nx(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every module calls its GPU "Orin", of compute capability 8.7."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    record = replace(
        RECORD,
        platform=f"{platform.system()}-aarch64".lower(),
        gpu=ORIN.name,
        gpu_processors=ORIN.processors,
        gpu_memory_bytes=ORIN.memory_bytes,
        compute_capabilities=(ORIN.compute_capability,),
    )
    place = Path("policy/manifest.json")
    check_match(record, VERSION, replace(ORIN, memory_bytes=62_800_000_000), place)  # another release of its firmware
    with pytest.raises(ArtifactError, match=message + r".*evla build policy --flavour tensorrt; on a Jetson.*nvpmodel"):
        check_match(record, VERSION, replace(ORIN, **change), place)


@pytest.mark.parametrize("missing", ["gpu", "gpu_processors", "gpu_memory_bytes"])
def test_a_manifest_that_does_not_tell_the_gpu_of_an_engine_is_refused(missing: str, artifact: Path) -> None:
    place = artifact / "manifest.json"
    text = json.loads(place.read_text(encoding="utf-8"))
    text["engine"][missing] = None
    place.write_text(json.dumps(text), encoding="utf-8")
    with pytest.raises(ArtifactError, match="expected those of the GPU that built them"):
        read_manifest(place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": "10.3.0"},
            r"built by TensorRT 10\.3\.0, and 10\.13\.0 is installed; .*evla build .*policy --fl",
        ),
        ({"version": "11.0.0", "version_compatible": True}, r"built by TensorRT 11\.0\.0, and 10\.13\.0 is installed"),
        ({"version": "10.14.0", "version_compatible": True}, r"built by TensorRT 10\.14\.0, and 10\.13\.0"),
        ({"platform": "linux-riscv64"}, "was built for linux-riscv64, and this is"),
        ({"compute_capabilities": ("8.6",)}, r"of compute capability 8\.6 .*and this is Fake RTX, 8\.9 .*evla build"),
        (
            {"gpu": "Fake RTX Ti"},
            r"built for Fake RTX Ti of compute capability 8\.9 with 24 multi.*, and this is Fake RTX",
        ),
        (
            {**OF_RTX, "compute_capabilities": ("8.6", "12.0")},
            r"built for GPUs of compute capability 8\.6, 12\.0, .*--flavour tensorrt_rtx --capability 8\.9",
        ),
    ],
)
def test_an_engine_for_something_else_is_refused_with_what_builds_it(
    change: dict[str, Any], message: str, gpu: FakeGpu, tmp_path: Path, tokenizer_json: str
) -> None:
    folder = write(tmp_path / "policy", replace(RECORD, **change), tokenizer_json)
    with pytest.raises(ArtifactError, match=message):
        load(folder, "engine")
    assert gpu.log == []  # before anything is loaded


@pytest.mark.parametrize(
    ("change", "capability"),
    [
        ({"version": "10.3.0", "version_compatible": True}, "8.9"),
        ({"gpu": "Other", "hardware_compatible": True}, "8.9"),
        ({"gpu": "Other", "hardware_compatible": True}, "12.0"),
    ],
)
def test_compatible_engines_run_elsewhere(change: dict[str, Any], capability: str) -> None:
    here = Gpu(
        name="Fake RTX", compute_capability=capability, memory_bytes=24_000, processors=24, driver_version="13.0"
    )
    check_match(replace(RECORD, **change), VERSION, here, Path("policy/manifest.json"))


def test_portable_rtx_engines_do_not_run_on_a_datacentre_gpu() -> None:
    record = replace(RECORD, **OF_RTX, compute_capabilities=())
    for capability in ("8.0", "8.6", "8.9", "12.0"):
        here = Gpu(name="RTX", compute_capability=capability, memory_bytes=24_000, processors=24, driver_version="13.0")
        check_match(record, record.version, here, Path("manifest.json"))
    hopper = Gpu(name="H200", compute_capability="9.0", memory_bytes=24_000, processors=24, driver_version="13.0")
    with pytest.raises(ArtifactError, match=r"and this is H200, 9\.0"):
        check_match(record, record.version, hopper, Path("manifest.json"))


def test_a_machine_without_gpu_is_told_so(gpu: FakeGpu, artifact: Path) -> None:
    gpu.count = 0
    sys.modules["cuda.bindings.runtime"] = gpu.runtime()
    with pytest.raises(EvlaError, match=r"TensorRT runs engines on a GPU, .*provider='cpu'"):
        load(artifact, "engine")


def test_a_corrupted_engine_fails_on_its_hash(gpu: FakeGpu, artifact: Path) -> None:
    engine = artifact / "model.action.engine"
    data = bytearray(engine.read_bytes())
    data[3] ^= 1
    engine.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.action\.engine has the SHA-256"):
        load(artifact, "engine")


def test_an_engine_that_the_library_refuses_is_named_with_its_reason(
    gpu: FakeGpu, tmp_path: Path, tokenizer_json: str
) -> None:
    folder = write(tmp_path / "policy", RECORD, tokenizer_json, {"action": b"no engine"})
    with pytest.raises(ArtifactError, match=r"action\.engine cannot be loaded by TensorRT: Magic tag .*evla build"):
        load(folder, "engine")
    assert not gpu.memory
    assert gpu.log[-1] == "destroy stream"


def test_an_engine_of_another_graph_is_refused(gpu: FakeGpu, tmp_path: Path, tokenizer_json: str) -> None:
    other = fake_engine("action", [("noise", "FLOAT", (1, 8, 7), True), ("samples", "FLOAT", (1, 16, 7), False)])
    folder = write(tmp_path / "policy", RECORD, tokenizer_json, {"action": other})
    with pytest.raises(ArtifactError, match=r"engine of action has the tensors noise float32\[1, 8, 7\].*evla build"):
        load(folder, "engine")


def test_an_artifact_without_engine_says_how_to_build_one(artifact: Path) -> None:
    manifest = read_manifest(artifact / "manifest.json")
    write_manifest(replace(manifest, engine=None), artifact / "manifest.json")
    with pytest.raises(ArtifactError, match=rf"holds no engine: build it, evla build {artifact}"):
        load(artifact, "engine")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("tensorrt", r'TensorRT cannot be imported .*pip install "evla-compile\[tensorrt\]"'),
        (
            "cuda.bindings.runtime",
            r'CUDA cannot be called .*pip install "evla-compile\[tensorrt\]" or "evla-compile',
        ),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    module: str, message: str, gpu: FakeGpu, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EvlaError, match=message):
        load(artifact, "engine")


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("cudaMalloc", "cudaMalloc failed: cudaErrorMemoryAllocation"),
        ("cudaMemcpyAsync", "cudaMemcpyAsync failed"),
        ("execute", "TensorRT failed to run perception"),
    ],
)
def test_a_call_that_fails_is_named(
    failing: str, message: str, gpu: FakeGpu, artifact: Path, feeds: dict[str, NDArray[Any]]
) -> None:
    gpu.failing = failing
    with pytest.raises(EvlaError, match=message):
        load(artifact, "engine").sample(**feeds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"provider": "engine", "mapped": True}, "mapped=, threads= and allow_cpu= are for ONNX Runtime"),
        ({"provider": "engine", "allow_cpu": True}, "mapped=, threads= and allow_cpu= are for ONNX Runtime"),
        ({"provider": "engine", "threads": 2}, "mapped=, threads= and allow_cpu= are for ONNX Runtime"),
        ({"provider": "cpu", "cuda_graph": True}, "cuda_graph=True with provider='cpu'"),
        ({"provider": "engine", "cache": "x"}, "cache=x with TensorRT, which compiles when it builds"),
    ],
)
def test_settings_of_another_provider_are_refused(
    settings: dict[str, Any], message: str, gpu: FakeGpu, artifact: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(artifact, check_hashes=settings["provider"] == "engine", **settings)


# The GPU of a machine


def test_a_gpu_is_described(gpu: FakeGpu) -> None:
    found = Gpu(name="Fake RTX", compute_capability="8.9", memory_bytes=24_000, processors=24, driver_version="13.1")
    assert find_gpu() == found


def test_this_machine_s_gpu_is_found_or_is_not_there() -> None:
    """The real cuda-bindings: what nvidia-smi shows, they find."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    driver = shutil.which("nvidia-smi")
    listed = (
        "" if driver is None else subprocess.run([driver, "-L"], capture_output=True, text=True, check=False).stdout
    )
    assert (find_gpu() is not None) == ("GPU 0" in listed)


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("policies/one/manifest.json", "policies/one"),
        ("policies/one.manifest.json", "policies/one.manifest.json"),
        ("our policies/manifest.json", "'our policies'"),
    ],
)
def test_the_command_that_builds_names_what_it_is_to_build(place: str, target: str) -> None:
    gpu = Gpu(name="Fake RTX", compute_capability="8.9", memory_bytes=2**34, processors=60, driver_version="13.0")
    assert build_command("tensorrt", Path(place)) == f"evla build {target} --flavour tensorrt"
    assert build_command("tensorrt", Path(place), gpu) == f"evla build {target} --flavour tensorrt"
    assert build_command("tensorrt_rtx", Path(place)) == f"evla build {target} --flavour tensorrt_rtx"
    built = build_command("tensorrt_rtx", Path(place), gpu)
    assert built == f"evla build {target} --flavour tensorrt_rtx --capability 8.9"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_real_engine_runs_and_equals_its_graph(tiny_policy: CogACT, tmp_path: Path) -> None:
    """The golden policy, built for the GPU of this machine, against what its torch graph returned."""
    found = find_gpu()
    assert found is not None
    settings = EngineSettings()
    if find_flavour(settings) == "tensorrt_rtx":
        settings = replace(settings, compute_capabilities=(found.compute_capability,))
    target = tmp_path / "policy.engine"
    evla.compile(tiny_policy, CompileConfig.dense(ddim_steps=2)).export(target, engine=settings)
    verified = evla.verify(target)
    assert dict(verified.errors)["samples"] <= verified.tolerance
    policy, again = load(target), load(target, cuda_graph=True)
    case = read_cases(tmp_path / "policy.cases.npz", read_manifest(tmp_path / "policy.manifest.json"))[0]
    for _ in range(3):
        assert np.array_equal(policy.sample(*case.inputs.arrays), again.sample(*case.inputs.arrays))
    assert policy.latency.summary()[0].count == 2

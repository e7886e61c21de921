"""Engines, built for real by TensorRT-RTX on the CPU, and every refusal on the way to one."""

import platform
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console
from rich.progress import Progress

from evla_compile.errors import EvlaError, ExportError
from evla_compile.exporters import to_tensorrt as exporter
from evla_compile.exporters.build_progress import make_monitor
from evla_compile.exporters.to_tensorrt import build_error, check_memory, to_tensorrt
from evla_compile.settings.engine_settings import FLAVOURS, RTX_CAPABILITIES, EngineSettings
from evla_compile.tensorrt import library as tensorrt_library
from evla_compile.tensorrt.library import create, find_flavour, import_flavour, make_logger

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13, which has wheels for x86-64 alone")
RTX = EngineSettings(flavour="tensorrt_rtx")


def save(path: Path, nodes: list[onnx.NodeProto], *, shape: list[int | str] | None = None) -> Path:
    """Write a graph x -> y, float32, by default [2,8]."""
    value = helper.make_tensor_value_info
    shape = shape or [2, 8]
    graph = helper.make_graph(
        nodes, "toy", [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, shape)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save_model(model, path)
    return path


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return save(tmp_path / "toy.onnx", [helper.make_node("Relu", ["x"], ["y"], name="mlp.act/Relu_0")])


def test_an_engine_is_built_with_its_signature_and_layers(toy: Path, tmp_path: Path) -> None:
    built = to_tensorrt(toy, tmp_path / "toy.engine", RTX)
    assert built.layers == 1
    assert built.inputs == ("x float32[2, 8]",)
    assert built.outputs == ("y float32[2, 8]",)
    assert (tmp_path / "toy.engine").stat().st_size > 1000


def test_the_same_build_gives_the_same_bytes(toy: Path, tmp_path: Path) -> None:
    settings = replace(RTX, compute_capabilities=("8.6", "8.9", "12.0"))
    for name in ("one.engine", "two.engine"):
        to_tensorrt(toy, tmp_path / name, settings)
    assert (tmp_path / "one.engine").read_bytes() == (tmp_path / "two.engine").read_bytes()


def test_capabilities_reach_the_builder(toy: Path, tmp_path: Path) -> None:
    for capabilities in ((), ("8.9",), ("8.6", "8.9", "12.0")):
        to_tensorrt(toy, tmp_path / f"{len(capabilities)}.engine", replace(RTX, compute_capabilities=capabilities))
    sizes = [(tmp_path / f"{count}.engine").read_bytes() for count in (0, 1, 3)]
    assert len(set(sizes)) == 3


def test_every_capability_named_exists_in_the_library() -> None:
    known = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    assert {f"SM{capability.replace('.', '')}" for capability in RTX_CAPABILITIES} == known - {"SM75"}


def test_attention_without_a_dedicated_kernel_may_be_decomposed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["k"], name="self_attn/Relu_0"),
        helper.make_node("Sigmoid", ["x"], ["v"], name="self_attn/Sigmoid_1"),
        helper.make_node("Attention", ["x", "k", "v"], ["y"], name="self_attn/Attention_2"),
    ]
    model = save(tmp_path / "attention.onnx", nodes, shape=[1, 2, 5, 16])
    assert to_tensorrt(model, tmp_path / "attention.engine", RTX).attentions > 0


# Refusals


def test_an_unsupported_operator_is_named_with_its_module(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Det", ["x"], ["d"], name="llm_backbone.norm/Det_0"),
        helper.make_node("Add", ["x", "d"], ["y"], name="llm_backbone.norm/Add_1"),
    ]
    model = save(tmp_path / "unknown.onnx", nodes, shape=[1, 4, 4])
    with pytest.raises(ExportError, match=r"refuses the Det node 'llm_backbone\.norm/Det_0' of llm_backbone\.norm in"):
        to_tensorrt(model, tmp_path / "unknown.engine", RTX)
    assert not (tmp_path / "unknown.engine").exists()


def test_an_unsupported_operator_of_a_pass_is_named_with_the_pass(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Det", ["x"], ["d"], name="select_tokens/SelectTokens.Det_0"),
        helper.make_node("Add", ["x", "d"], ["y"], name="select_tokens/SelectTokens.Add_1"),
    ]
    model = save(tmp_path / "unknown.onnx", nodes, shape=[1, 4, 4])
    with pytest.raises(ExportError, match=r"Det node .* of select_tokens, written by SelectTokens, in unknown"):
        to_tensorrt(model, tmp_path / "unknown.engine", RTX)


def test_a_dynamic_dimension_is_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "dynamic.onnx", [helper.make_node("Relu", ["x"], ["y"])], shape=["batch", 8])
    with pytest.raises(ExportError, match=r"dynamic\.onnx: x has the dynamic shape \[-1, 8\], and engines are static"):
        to_tensorrt(model, tmp_path / "dynamic.engine", RTX)


def test_a_file_that_is_no_onnx_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"cannot read .*broken\.onnx"):
        to_tensorrt(tmp_path / "broken.onnx", tmp_path / "broken.engine", RTX)


def test_too_little_memory_is_refused_before_the_build(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(
        EvlaError, match=r"building toy\.onnx takes about 7[0-9]{2}\.\d MB .* 100\.0 MB are free: .*more parts"
    ):
        to_tensorrt(toy, tmp_path / "toy.engine", replace(RTX, memory_bytes=100_000_000))


def test_external_data_counts_towards_the_memory_that_a_build_takes(toy: Path) -> None:
    limit = replace(RTX, memory_bytes=4_000_000_000)
    check_memory(toy, limit)
    with (toy.with_name("toy.onnx.data")).open("wb") as file:
        file.truncate(1_100_000_000)
    with pytest.raises(EvlaError, match=r"takes about 4\.2 GB \(3\.2 times its 1\.1 GB of weights"):
        check_memory(toy, limit)


def test_running_out_of_memory_is_called_that(tmp_path: Path) -> None:
    """A build in a process that may take no more memory."""
    weights = [helper.make_node("MatMul", ["x", "w"], ["y"], name="mlp/MatMul_0")]
    save(tmp_path / "large.onnx", weights, shape=[2, 5000])
    model = onnx.load(tmp_path / "large.onnx")
    model.graph.initializer.append(
        helper.make_tensor("w", TensorProto.FLOAT, [5000, 5000], bytes(4 * 5000 * 5000), raw=True)
    )
    onnx.save(model, tmp_path / "large.onnx")
    program = """
import re, resource, sys
from pathlib import Path
import tensorrt_rtx
from evla_compile.settings.engine_settings import EngineSettings
from evla_compile.exporters.build_progress import make_monitor
from evla_compile.exporters.to_tensorrt import to_tensorrt
taken = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken + 60_000_000,) * 2)
folder = Path(sys.argv[1])
settings = EngineSettings(flavour="tensorrt_rtx", memory_bytes=10**12)
try:
    to_tensorrt(folder / "large.onnx", folder / "large.engine", settings)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "EvlaError TensorRT-RTX ran out of memory building large.onnx" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("logged", "kind", "message"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 8 bytes.)", EvlaError, "ran out of memory .*Requested size"),
        ("Unexpected exception std::bad_alloc In compileGraph", EvlaError, "ran out of memory"),
        ("Could not find any implementation for node {x}", ExportError, "also says so when memory is short"),
        ("Internal error in Myelin", ExportError, "cannot build toy.onnx: Internal error in Myelin$"),
    ],
)
def test_what_the_library_says_of_a_failed_build_is_passed_on(
    logged: str, kind: type[Exception], message: str, toy: Path
) -> None:
    error = build_error(toy, [logged], "tensorrt_rtx")
    assert type(error) is kind
    with pytest.raises(kind, match=message):
        raise error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flavour": "trt"}, "flavour='trt': expected one of tensorrt, tensorrt_rtx"),
        ({"flavour": "tensorrt_rtx", "compute_capabilities": ("9.0",)}, "9.0: TensorRT-RTX builds for .*H100 and H200"),
        ({"flavour": "tensorrt_rtx", "compute_capabilities": ("8.7",)}, "8.7: TensorRT-RTX builds for .*Orin is for"),
        ({"flavour": "tensorrt_rtx", "compute_capabilities": ("7.5",)}, "7.5: .* no float32 matrix products"),
        ({"flavour": "tensorrt_rtx", "compute_capabilities": ("8.9", "8.9")}, "expected each once"),
        ({"flavour": "tensorrt_rtx", "hardware_compatible": True}, "hardware_compatible=True with TensorRT-RTX"),
        ({"flavour": "tensorrt_rtx", "version_compatible": True}, "version_compatible=True .*lacks the lean runtime"),
        ({"flavour": "tensorrt_rtx", "timing_cache": Path("x")}, "timing_cache=.*measures nothing when it builds"),
        ({"flavour": "tensorrt_rtx", "optimization_level": 3}, "optimization_level=3 with TensorRT-RTX"),
        ({"flavour": "tensorrt", "compute_capabilities": ("8.9",)}, "with TensorRT, which builds for the GPU"),
        ({"workspace_bytes": 0}, "workspace_bytes=0: expected a whole number of bytes from 1 up"),
        ({"memory_bytes": 1.5}, "memory_bytes=1.5: expected a whole number of bytes"),
        ({"optimization_level": 6}, "optimization_level=6: expected a whole number from 0 to 5"),
    ],
)
def test_a_setting_that_a_flavour_does_not_have_is_refused_with_the_reason(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EngineSettings(**settings)


def test_settings_are_held_against_the_flavour_that_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "_is_installed", lambda flavour: flavour == "tensorrt_rtx")
    assert find_flavour(EngineSettings()) == "tensorrt_rtx"
    with pytest.raises(ValueError, match="hardware_compatible=True with TensorRT-RTX"):
        find_flavour(EngineSettings(hardware_compatible=True))


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ((), r"no library that builds engines .*evla-compile\[tensorrt\].*evla-compile\[rtx\]"),
        (FLAVOURS, "TensorRT and TensorRT-RTX are installed: choose by flavour="),
    ],
)
def test_a_flavour_is_never_guessed(installed: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "_is_installed", lambda flavour: flavour in installed)
    with pytest.raises(EvlaError, match=message):
        find_flavour(EngineSettings())


@pytest.mark.parametrize(
    ("flavour", "message"),
    [
        ("tensorrt", r'TensorRT cannot be imported .*pip install "evla-compile\[tensorrt\]" on a PC; on a Jetson'),
        ("tensorrt_rtx", r'TensorRT-RTX cannot be imported .*pip install "evla-compile\[rtx\]"'),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    flavour: Any, message: str, monkeypatch: pytest.MonkeyPatch, toy: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, flavour, None)
    with pytest.raises(EvlaError, match=message):
        to_tensorrt(toy, tmp_path / "toy.engine", EngineSettings(flavour=flavour))


def test_a_library_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(EvlaError, match=r"TensorRT 8\.6\.1 is too old: expected 10\.3 or newer"):
        import_flavour("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    assert import_flavour("tensorrt").__version__ == "10.3.0"


# TensorRT itself, which cannot be installed here: TensorRT-RTX under its name, which has the same Python interface


class NamedTensorRT:
    """The module of TensorRT-RTX under the name of TensorRT, with the calls that only TensorRT honours recorded."""

    def __init__(self) -> None:
        self._module = import_module("tensorrt_rtx")
        self.__version__ = "10.13.0"
        self.recorded: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def Builder(self, logger: Any) -> Any:  # noqa: N802 (the library's name)
        recorded, builder = self.recorded, self._module.Builder(logger)

        class Cache:
            def __init__(self, data: bytes) -> None:
                recorded["read"] = data

            def serialize(self) -> bytes:
                return b"timings of " + bytes(recorded["read"])

        class Config:
            """A builder configuration that keeps what it is told."""

            def __init__(self) -> None:
                self._config = builder.create_builder_config()
                self._config.num_compute_capabilities = 1
                self._config.set_compute_capability(trt.ComputeCapability.SM89, 0)

            def create_timing_cache(self, data: bytes) -> Cache:
                if data == b"damaged":
                    logger.log(trt.ILogger.WARNING, "Failed to deserialize timing cache. Returning an empty one.")
                return Cache(data)

            def set_timing_cache(self, cache: Cache, *, ignore_mismatch: bool) -> bool:
                recorded["cache"], recorded["ignore_mismatch"] = cache, ignore_mismatch
                if recorded["read"] == b"of another GPU":
                    logger.log(trt.ILogger.ERROR, "Device properties differ")
                    return False
                return True

            def get_timing_cache(self) -> Cache:
                cache: Cache = recorded["cache"]
                return cache

            def set_memory_pool_limit(self, pool: Any, size: int) -> None:
                recorded[pool.name] = size

            def set_flag(self, flag: Any) -> None:
                recorded[flag.name] = True

            def __setattr__(self, name: str, value: Any) -> None:
                if name == "_config":
                    object.__setattr__(self, name, value)
                else:
                    recorded[name] = value

        class Recording:
            def create_network(self, flags: int) -> Any:
                recorded["network flags"] = flags
                return builder.create_network(flags)

            def create_builder_config(self) -> Config:
                return Config()

            def build_serialized_network(self, network: Any, config: Config) -> Any:
                return builder.build_serialized_network(network, config._config)

        return Recording()


@pytest.fixture
def named_tensorrt(monkeypatch: pytest.MonkeyPatch) -> NamedTensorRT:
    module = NamedTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def test_tensorrt_is_told_every_setting_and_its_timings_are_kept(
    named_tensorrt: NamedTensorRT, toy: Path, tmp_path: Path
) -> None:
    settings = EngineSettings(
        flavour="tensorrt",
        workspace_bytes=123_000_000,
        optimization_level=4,
        timing_cache=tmp_path / "timing.cache",
        hardware_compatible=True,
        version_compatible=True,
    )
    to_tensorrt(toy, tmp_path / "toy.engine", settings)
    recorded = named_tensorrt.recorded
    assert recorded["network flags"] == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert recorded["WORKSPACE"] == 123_000_000
    assert recorded["builder_optimization_level"] == 4
    assert recorded["hardware_compatibility_level"] == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert recorded["VERSION_COMPATIBLE"]
    assert recorded["ignore_mismatch"] is False
    assert (tmp_path / "timing.cache").read_bytes() == b"timings of "
    to_tensorrt(toy, tmp_path / "toy.engine", settings)
    assert recorded["read"] == b"timings of "
    assert (tmp_path / "timing.cache").read_bytes() == b"timings of timings of "
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timing.cache", "toy.engine", "toy.onnx"]


@pytest.mark.parametrize(
    ("contents", "reason"),
    [(b"of another GPU", "Device properties differ"), (b"damaged", "Failed to deserialize timing cache")],
)
def test_a_timing_cache_that_is_refused_is_not_ignored(
    contents: bytes, reason: str, named_tensorrt: NamedTensorRT, toy: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(contents)
    settings = EngineSettings(flavour="tensorrt", timing_cache=cache)
    with pytest.raises(EvlaError, match=rf"timing\.cache is refused \({reason}.*another GPU or version; delete it"):
        to_tensorrt(toy, tmp_path / "toy.engine", settings)
    assert cache.read_bytes() == contents
    assert not (tmp_path / "toy.engine").exists()


def test_the_folder_of_a_timing_cache_is_made_before_the_build(
    named_tensorrt: NamedTensorRT, toy: Path, tmp_path: Path
) -> None:
    settings = EngineSettings(flavour="tensorrt", timing_cache=tmp_path / "robot" / "kept" / "timing.cache")
    to_tensorrt(toy, tmp_path / "toy.engine", settings)
    assert (tmp_path / "robot" / "kept" / "timing.cache").exists()
    with pytest.raises(EvlaError, match=r"timing cache .*toy\.onnx/timing\.cache cannot be used: "):
        to_tensorrt(toy, tmp_path / "new.engine", replace(settings, timing_cache=toy / "timing.cache"))
    assert not (tmp_path / "new.engine").exists()


def test_a_capability_that_the_library_refuses_is_not_ignored() -> None:
    """The library says so by what it returns, and goes on without it."""
    log = SimpleNamespace(errors=["Compute capability is invalid or not supported"], warnings=[])
    config = SimpleNamespace(set_compute_capability=lambda capability, index: False)
    builder = SimpleNamespace(create_builder_config=lambda: config)
    with pytest.raises(ExportError, match=r"does not take the compute capability 8\.9: Compute capability is invalid"):
        exporter._configure(trt, builder, replace(RTX, compute_capabilities=("8.9",)), log)


def test_a_library_that_gives_no_builder_is_an_error_of_ours() -> None:
    """Without a driver TensorRT's bindings raise a TypeError of their own."""

    class Builder:
        def __init__(self, log: Any) -> None:
            log.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(EvlaError, match="no Builder can be created: CUDA initialization failure with error: 35"):
        create(Builder, make_logger(trt))


def test_hardware_compatible_engines_are_refused_on_a_jetson(
    named_tensorrt: NamedTensorRT, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(exporter, "_JETSON_MARK", toy)
    with pytest.raises(ValueError, match="TensorRT has no such engines on a Jetson"):
        to_tensorrt(toy, tmp_path / "toy.engine", EngineSettings(flavour="tensorrt", hardware_compatible=True))


def test_the_phases_of_a_build_are_drawn_one_below_the_other() -> None:
    with Progress(console=Console(file=StringIO())) as bar:
        monitor = make_monitor(trt, bar, "Building toy.engine")
        monitor.phase_start("Building engine", None, 4)
        monitor.phase_start("Timing", "Building engine", 10)
        assert monitor.step_complete("Timing", 6)
        assert [(task.description, task.completed, task.total) for task in bar.tasks] == [
            ("Building toy.engine", 0, 4),
            ("  Timing", 7, 10),
        ]
        monitor.phase_finish("Timing")
        assert [task.description for task in bar.tasks] == ["Building toy.engine"]


def test_a_build_reports_its_phases(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []

    def add_task(_: Progress, title: str, *, total: int) -> int:
        phases.append(title)
        return total

    monkeypatch.setattr(Progress, "add_task", add_task)
    monkeypatch.setattr(Progress, "update", lambda self, task, completed: None)
    monkeypatch.setattr(Progress, "remove_task", lambda self, task: None)
    to_tensorrt(toy, tmp_path / "toy.engine", RTX, progress=True)
    assert phases[0] == "Building toy.engine"
    assert len(phases) > 3

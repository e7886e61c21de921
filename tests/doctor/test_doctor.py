"""The doctor: every check through facts that a test makes up, and the commands on this machine and without torch."""

import contextlib
import io
import json
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evla_compile
from evla_compile import cli, memory
from evla_compile.doctor.facts import Facts, Import, collect, driver_version, free_swap, try_import
from evla_compile.doctor.request import Finding, Request, make_request
from evla_compile.doctor.survey import findings, survey
from evla_compile.errors import ArtifactError, EvlaError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.settings.engine_settings import EngineSettings
from evla_compile.settings.precision import Precision
from evla_compile.tensorrt.cuda import Gpu

ADA = Gpu(
    name="NVIDIA GeForce RTX 4090",
    compute_capability="8.9",
    memory_bytes=24_000_000_000,
    processors=128,
    driver_version="13.0",
)
FACTS = Facts(
    python=(3, 11),
    platform="linux-x86_64",
    jetson=None,
    packages={"onnxruntime": "1.32.0", "torch": "2.13.0", "tensorrt-rtx-cu13": "1.7.1.116"},
    imports={
        "torch": Import(found={"version": "2.13.0+cpu", "cuda": None}),
        "transformers": Import(found={"version": "5.23.0"}),
        "onnxscript": Import(found={"version": "0.7.2"}),
        "onnxruntime": Import(found={"version": "1.32.0", "providers": "CPUExecutionProvider", "cuda": None}),
        "session-cpu": Import(found={"taken": "CPUExecutionProvider"}),
        "session-cuda": Import(found={"taken": "CPUExecutionProvider"}),
        "session-tensorrt": Import(found={"taken": "CPUExecutionProvider"}),
        "session-openvino": Import(found={"taken": "CPUExecutionProvider"}),
        "tensorrt": Import(found={"version": "10.13.0"}),
        "tensorrt_rtx": Import(found={"version": "1.7.1.116"}),
    },
    gpu=ADA,
    gpu_error=None,
    driver="580.65.06",
    memory=20_000_000_000,
    disk=50_000_000_000,
)
COMPILE = Request(work="compile", weight_bytes=9_000_000_000, total_bytes=9_000_000_000)
RUN = Request(work="run", weight_bytes=9_000_000_000, total_bytes=9_000_000_000)
CUDA = replace(RUN, provider="cuda")
ENGINE = replace(RUN, provider="engine")
BUILD = Request(work="build", weight_bytes=5_000_000_000, total_bytes=9_000_000_000)
NVISION = "RuntimeError: operator torchvision::nms does not exist"
NO_GPU = replace(FACTS, gpu=None, driver=None)
GPU_RUNTIME = {
    "version": "1.31.1",
    "providers": "TensorrtExecutionProvider CUDAExecutionProvider CPUExecutionProvider",
    "cuda": "13.0",
}


def changed(imports: dict[str, Import], **facts: Any) -> Facts:
    return replace(FACTS, imports={**FACTS.imports, **imports}, **facts)


CUDA_RUNTIME = changed(
    {"onnxruntime": Import(found=GPU_RUNTIME), "session-cuda": Import(found={"taken": "CUDAExecutionProvider"})},
    packages={"onnxruntime-gpu": "1.31.1"},
)


@pytest.mark.parametrize(
    ("request_", "facts"),
    [
        (COMPILE, FACTS),
        (RUN, FACTS),
        (RUN, NO_GPU),
        (CUDA, CUDA_RUNTIME),
        (BUILD, FACTS),
        (replace(BUILD, flavour="tensorrt_rtx"), NO_GPU),
        (ENGINE, FACTS),
    ],
)
def test_a_machine_that_has_everything_can(request_: Request, facts: Facts) -> None:
    found = list(findings(request_, facts))
    assert {finding.status for finding in found} == {"ok"}
    assert all(finding.remedy is None for finding in found)


@pytest.mark.parametrize(
    ("request_", "facts", "check", "found", "remedy"),
    [
        (RUN, replace(FACTS, python=(3, 10)), "Python", "3.10", "install Python 3.11 or newer"),
        (
            COMPILE,
            changed({"torch": Import(error="No module named 'torch'")}),
            "PyTorch",
            "No module",
            "pip install torch==",
        ),
        (
            COMPILE,
            changed({"torch": Import(found={"version": "2.6.0", "cuda": None})}),
            "PyTorch",
            "2.6.0, expected",
            "pip",
        ),
        (
            COMPILE,
            changed({"torch": Import(found={"version": "2.16.0", "cuda": None})}),
            "PyTorch",
            "2.11 to 2.15",
            "pip",
        ),
        (
            COMPILE,
            replace(changed({"transformers": Import(error=NVISION)}), packages={"torchvision": "0.28.0"}),
            "transformers",
            "torchvision 0.28.0, which nothing here needs, is of another build than torch",
            "pip uninstall -y torchvision",
        ),
        (COMPILE, changed({"transformers": Import(error="No module")}), "transformers", "No module", "pip install"),
        (COMPILE, changed({"onnxscript": Import(error="No module")}), "ONNX export", "No module", "pip install"),
        (
            RUN,
            replace(FACTS, packages={"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}),
            "ONNX Runtime's packages",
            "onnxruntime and onnxruntime-gpu overwrite each other",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime",
        ),
        (RUN, replace(FACTS, packages={}), "ONNX Runtime's packages", "none is installed", "pip install onnxruntime"),
        (
            CUDA,
            FACTS,
            "ONNX Runtime",
            "offers CPUExecutionProvider, not CUDAExecutionProvider",
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu",
        ),
        (
            replace(RUN, provider="openvino"),
            FACTS,
            "ONNX Runtime",
            "not OpenVINOExecutionProvider",
            "pip install onnxruntime-openvino",
        ),
        (
            RUN,
            changed({"onnxruntime": Import(error="ImportError: libonnx")}),
            "ONNX Runtime",
            "libonnx",
            "pip uninstall -y",
        ),
        (
            CUDA,  # offered, and yet its libraries do not load
            changed(
                {
                    "onnxruntime": Import(found=GPU_RUNTIME),
                    "session-cuda": Import(found={"taken": "CPUExecutionProvider"}, missing=("libcublasLt.so.13",)),
                },
                packages={"onnxruntime-gpu": "1.31.1"},
            ),
            "ONNX Runtime",
            "offers CUDAExecutionProvider, which does not load: libcublasLt.so.13 not found",
            "install CUDA 13 and cuDNN 9",
        ),
        (
            CUDA,
            replace(CUDA_RUNTIME, gpu=replace(ADA, driver_version="12.6")),
            "CUDA driver",
            "supports CUDA 12.6, onnxruntime-gpu needs 13.0",
            "a driver for CUDA 13: 580 or newer",
        ),
        (BUILD, changed({"tensorrt": Import(error="No module")}), "TensorRT", "No module", "evla-compile[tensorrt]"),
        (
            BUILD,
            changed({"tensorrt": Import(found={"version": "8.6.1"})}),
            "TensorRT",
            "expected 10.3 or newer",
            "pip install",
        ),
        (
            replace(BUILD, flavour="tensorrt_rtx"),
            changed({"tensorrt_rtx": Import(found={"version": "1.1.0"})}),
            "TensorRT-RTX",
            "expected 1.4 or newer",
            "evla-compile[rtx]",
        ),
        (
            BUILD,  # the part of the package that PyPI holds, without the libraries that it fetches from NVIDIA
            changed(
                {"tensorrt": Import(error="ImportError: libnvonnxparser.so.11: cannot open shared object file")},
                packages={"tensorrt-cu13": "11.4.0", "tensorrt-cu13-bindings": "11.4.0"},
            ),
            "TensorRT",
            "tensorrt-cu13 11.4.0, tensorrt-cu13-bindings 11.4.0: installed, and does not import: ImportError",
            "pip uninstall -y tensorrt-cu13 tensorrt-cu13-bindings &&"
            " pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu13",
        ),
        (
            BUILD,
            changed({"tensorrt": Import(error="No module")}, jetson="# R39 (release), REVISION: 2.0"),
            "TensorRT",
            "No module",
            "sudo apt install python3-libnvinfer",
        ),
        (BUILD, NO_GPU, "GPU", "no driver of NVIDIA's is loaded", "until nvidia-smi lists"),
        (BUILD, replace(FACTS, gpu=None), "GPU", "the driver 580.65.06 shows no GPU", "docker run --gpus all"),
        (
            BUILD,
            replace(FACTS, gpu=None, gpu_error="no cuda-bindings", driver="540.4.0"),
            "GPU",
            "no cuda-bindings",
            'pip install "cuda-bindings==12.*"',
        ),
        (
            BUILD,
            replace(FACTS, gpu=None, driver="540.4.0", packages={"cuda-bindings": "13.5.0"}),
            "GPU",
            "the driver 540.4.0 is for CUDA 12, and cuda-bindings 13.5.0 calls a newer one",
            'pip install "cuda-bindings==12.*"',
        ),
        (
            replace(ENGINE, flavour="tensorrt_rtx"),
            replace(FACTS, gpu=replace(ADA, driver_version="12.6")),
            "CUDA driver",
            "supports CUDA 12.6, tensorrt-rtx-cu13 needs 13.0",
            "a driver for CUDA 13: 580 or newer",
        ),
        (
            RUN,
            replace(FACTS, memory=8_000_000_000, swap=9_000_000_000),  # ONNX Runtime's check does not count on swap
            "memory",
            "9.0 GB are needed, 8.0 GB free on the machine",
            "evla run --mapped",
        ),
        (COMPILE, replace(FACTS, memory=1_000_000_000), "memory", "2.0 GB are needed", "add swap"),
        (
            BUILD,
            replace(FACTS, memory=12_000_000_000, swap=2_000_000_000),
            "memory",
            "16.7 GB are needed, 12.0 GB free",
            "compile again with evla compile --parts 4; or add 2.7 GB of swap on a fast disk, and then evla build DIR"
            " --flavour tensorrt --memory-gb 17",
        ),
        (
            ENGINE,
            replace(FACTS, gpu=replace(ADA, memory_bytes=8_000_000_000)),
            "memory",
            "9.0 GB are needed, 8.0 GB free on the GPU",
            "a smaller preset",
        ),
        (
            ENGINE,  # whose GPU has all of the machine's memory, of which others took some
            replace(FACTS, jetson="# R39 (release), REVISION: 2.0", memory=8_000_000_000),
            "memory",
            "9.0 GB are needed, 8.0 GB free on the machine",
            "a smaller preset",
        ),
        (COMPILE, replace(FACTS, disk=9_000_000_000), "disk", "9.1 GB are needed, 9.0 GB free", "make room"),
        (BUILD, replace(FACTS, disk=6_000_000_000), "disk", "9.1 GB are needed, 6.0 GB free", "make room"),
    ],
)
def test_what_is_lacking_is_found_with_its_remedy(
    request_: Request, facts: Facts, check: str, found: str, remedy: str
) -> None:
    failed = {finding.check: finding for finding in findings(request_, facts) if finding.status == "failed"}
    assert check in failed
    assert found in failed[check].found
    assert remedy in (failed[check].remedy or "")


def test_a_build_that_fits_with_swap_is_a_warning_with_the_command_that_insists() -> None:
    facts = replace(FACTS, memory=12_000_000_000, swap=8_000_000_000)
    found = {finding.check: finding for finding in findings(replace(BUILD, flavour="tensorrt_rtx"), facts)}
    assert found["memory"].status == "warning"
    assert found["memory"].remedy == "evla build DIR --flavour tensorrt_rtx --memory-gb 17"


def test_parts_that_would_not_help_are_not_proposed() -> None:
    facts = replace(FACTS, memory=4_000_000_000)  # vision alone takes more
    found = {finding.check: finding for finding in findings(BUILD, facts)}
    assert "--parts" not in (found["memory"].remedy or "")


def test_a_torch_too_new_for_the_driver_is_a_warning_since_compiling_needs_no_gpu() -> None:
    torch = Import(found={"version": "2.13.0", "cuda": "13.0"})
    facts = changed({"torch": torch}, gpu=replace(ADA, driver_version="12.8"))
    found = {finding.check: finding for finding in findings(COMPILE, facts)}
    assert found["PyTorch"].status == "warning"
    assert "2.13.0 is for CUDA 13.0, the driver supports 12.8" in found["PyTorch"].found


def test_onnx_runtime_needs_no_cuda_bindings() -> None:
    facts = replace(CUDA_RUNTIME, gpu=None, gpu_error="No module named 'cuda'", driver="580.65.06")
    found = {finding.check: finding for finding in findings(CUDA, facts)}
    assert found["GPU"].status == "warning"
    assert found["GPU"].remedy == 'pip install "cuda-bindings==13.*"'
    assert "failed" not in {finding.status for finding in found.values()}


def test_a_library_that_does_not_say_which_cuda_it_needs_is_not_held_against_one() -> None:
    facts = replace(FACTS, gpu=replace(ADA, driver_version="12.6"))  # JetPack's TensorRT is no package of pip's
    found = {finding.check: finding for finding in findings(ENGINE, facts)}
    assert found["CUDA driver"].status == "ok"
    assert "TensorRT does not say which it needs" in found["CUDA driver"].found


@pytest.mark.parametrize(
    "request_",
    [replace(RUN, weight_bytes=None), replace(BUILD, weight_bytes=None, total_bytes=None)],
)
def test_an_unknown_size_is_a_warning_that_says_how_to_name_it(request_: Request) -> None:
    found = {finding.check: finding for finding in findings(request_, FACTS)}
    assert found["memory"].status == "warning"
    assert found["memory"].remedy == "name the policy: --artifact DIR, or --size base"


def test_a_system_that_does_not_tell_its_memory_is_a_warning() -> None:
    found = {finding.check: finding for finding in findings(RUN, replace(FACTS, memory=None))}
    assert found["memory"].status == "warning"


def test_the_doctor_and_the_builder_read_one_figure_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evla_compile.exporters.to_tensorrt import check_memory as check_build  # noqa: PLC0415 (none of the doctor's)

    model = tmp_path / "model.onnx"
    model.write_bytes(bytes(1000))
    for factor, figure in ((3.2, "700.0 MB"), (2e6, "2.7 GB")):
        monkeypatch.setattr(memory, "BUILD_FACTOR", factor)
        request = replace(BUILD, weight_bytes=1000, total_bytes=1000)
        found = next(found for found in findings(request, replace(FACTS, memory=10**8)) if found.check == "memory")
        assert found.found.startswith(f"{figure} are needed, 100.0 MB free")
        with pytest.raises(EvlaError, match=rf"takes about {figure}"):
            check_build(model, EngineSettings(memory_bytes=10**8))


def test_the_doctor_s_command_builds_a_single_file_export_too() -> None:
    """`X.onnx` lies beside other files: its folder is no artifact."""
    request = replace(BUILD, place=Path("/robot/my policies/x.manifest.json"))
    tight = replace(FACTS, memory=10**8, swap=10**11)
    found = next(found for found in findings(request, tight) if found.check == "memory")
    assert found.remedy == "evla build '/robot/my policies/x.manifest.json' --flavour tensorrt --memory-gb 17"


def test_bfloat16_on_a_cpu_takes_twice_its_weights_and_onnx() -> None:
    request = replace(RUN, precision="bfloat16", weight_bytes=9_000_000_000)
    assert "onnx" in request.imports
    assert "onnx" not in RUN.imports
    found = {finding.check: finding for finding in findings(request, changed({"onnx": Import(found={"version": "1"})}))}
    assert found["memory"].found == "18.0 GB are needed, 20.0 GB free on the machine"
    assert found["bfloat16"].status == "warning"
    assert found["bfloat16"].found == "it runs in float32 arithmetic on a CPU, in twice the memory of its weights"
    assert "failed" not in {finding.status for finding in found.values()}
    lacking = changed({"onnx": Import(error="ModuleNotFoundError: No module named 'onnx'")}, memory=10_000_000_000)
    found = {finding.check: finding for finding in findings(request, lacking)}
    assert found["bfloat16"].status == "failed"
    assert found["bfloat16"].remedy == "pip install onnx"
    assert found["memory"].status == "failed"
    assert str(found["memory"].remedy).startswith("evla run --mapped")


def test_a_policy_in_half_precision_is_not_told_to_halve_its_precision() -> None:
    small = replace(FACTS, gpu=replace(ADA, memory_bytes=8_000_000_000))
    remedies: dict[Precision, str] = {"float32": "evla compile --precision bfloat16", "bfloat16": "a smaller preset"}
    for precision, remedy in remedies.items():
        request = replace(ENGINE, precision=precision)
        found = next(finding for finding in findings(request, small) if finding.check == "memory")
        assert str(found.remedy).startswith(remedy)


# Everything at once


def test_a_survey_says_what_can_be_done_and_calls_nothing_broken_that_is_absent() -> None:
    absent = {name: Import(error="No module") for name in ("torch", "transformers", "onnxscript", "tensorrt")}
    facts = changed(absent, packages={"onnxruntime": "1.32.0", "tensorrt-rtx-cu13": "1.7.1"}, gpu=None, driver=None)
    found = survey(facts)
    status = {finding.check: finding.status for finding in found.findings}
    assert status["ONNX Runtime"] == status["TensorRT-RTX"] == "ok"
    assert {status[name] for name in ("PyTorch", "transformers", "ONNX export", "TensorRT", "GPU")} == {"absent"}
    can = [request.arguments() for request, lacks in found.lacks if not lacks]
    assert can == ["run --provider cpu", "build --flavour tensorrt_rtx"]
    lacks = {request.arguments(): names for request, names in found.lacks}
    assert lacks["compile"] == ("PyTorch", "transformers", "ONNX export")
    assert lacks["run --provider engine --flavour tensorrt_rtx"] == ("GPU",)


@pytest.mark.parametrize(
    ("facts", "broken"),
    [
        (replace(FACTS, packages={"onnxruntime": "1.32.0", "onnxruntime-directml": "1.32"}), "ONNX Runtime's packages"),
        (
            changed(
                {"transformers": Import(error=NVISION)},
                packages={"onnxruntime": "1.32.0", "transformers": "5.23.0", "torchvision": "0.28.0"},
            ),
            "transformers",
        ),
        (
            changed({"tensorrt": Import(error="libnvinfer")}, packages={"onnxruntime": "1", "tensorrt-cu13": "11"}),
            "TensorRT",
        ),
        (
            changed({"onnxruntime": Import(found=GPU_RUNTIME)}, packages={"onnxruntime-gpu": "1.31.1"}),
            "ONNX Runtime",
        ),
        (replace(FACTS, gpu=None), "GPU"),
    ],
)
def test_a_survey_tells_what_is_installed_and_broken(facts: Facts, broken: str) -> None:
    assert [finding.check for finding in survey(facts).findings if finding.status == "failed"] == [broken]


# Questions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"work": "compile", "provider": "engine"}, "--provider engine with compile: it is for evla doctor run"),
        ({"work": "run", "flavour": "tensorrt"}, "--flavour tensorrt: it is for evla doctor build, and run --provider"),
        ({"work": "compile", "artifact": Path("policy")}, "--artifact policy: it is for run and build"),
        ({"work": "run", "artifact": Path("policy"), "weight_bytes": 5}, "leave it or --size out"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_request(**arguments)


# Artifacts


@pytest.fixture(scope="module")
def artifact(tiny_policy: CogACT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden policy with an engine for Ada GPUs."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13, which has wheels for x86-64 alone")
    from evla_compile.exporters.build import build_engine  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("doctor") / "policy"
    compiled = evla_compile.compile(tiny_policy, evla_compile.CompileConfig.dense(ddim_steps=1))
    compiled.export(folder)
    settings = EngineSettings(flavour="tensorrt_rtx", compute_capabilities=("8.9",))
    build_engine(folder, settings, progress=False)
    return folder


def request_for(artifact: Path, **settings: Any) -> Request:
    return make_request(settings.pop("work", "run"), artifact=artifact, **settings)


def test_an_artifact_tells_its_size_and_flavour(artifact: Path) -> None:
    model, engine = ((artifact / name).stat().st_size for name in ("model.onnx", "model.engine"))
    assert request_for(artifact).weight_bytes == model
    assert request_for(artifact, work="build").weight_bytes == model
    assert request_for(artifact, provider="engine").weight_bytes == engine
    assert request_for(artifact, provider="engine").flavour == "tensorrt_rtx"


def test_an_engine_is_held_against_the_gpu(artifact: Path) -> None:
    request = request_for(artifact, provider="engine")
    assert {finding.status for finding in findings(request, FACTS)} == {"ok"}
    other = replace(FACTS, gpu=replace(ADA, name="NVIDIA H200", compute_capability="9.0"))
    (failed,) = [finding for finding in findings(request, other) if finding.status == "failed"]
    assert failed.check == "engine"
    assert "built for GPUs of compute capability 8.9, and this is NVIDIA H200, 9.0" in failed.found
    assert failed.remedy == f"evla build {artifact} --flavour tensorrt_rtx --capability 9.0"


def test_without_a_gpu_the_engine_is_not_to_blame(artifact: Path) -> None:
    found = {finding.check: finding for finding in findings(request_for(artifact, provider="engine"), NO_GPU)}
    assert found["GPU"].status == "failed"
    assert found["engine"].status == "warning"


def test_an_engine_of_the_other_flavour_is_not_asked_for(artifact: Path) -> None:
    with pytest.raises(ValueError, match=r"the engine in .* is of tensorrt_rtx"):
        request_for(artifact, provider="engine", flavour="tensorrt")
    assert request_for(artifact, work="build", flavour="tensorrt").flavour == "tensorrt"


def test_an_artifact_without_engine_has_none_to_run(artifact: Path) -> None:
    request = request_for(artifact, provider="engine")
    assert request.manifest is not None
    bare = replace(request, manifest=replace(request.manifest, engine=None))
    for facts in (FACTS, NO_GPU):  # it is said where there is no GPU, too
        failed = [finding for finding in findings(bare, facts) if finding.status == "failed"]
        assert "holds no engine" in failed[-1].found
        assert failed[-1].remedy is not None
        assert failed[-1].remedy.startswith(f"evla build {artifact} --flavour tensorrt_rtx")


def test_a_build_weighs_its_largest_part_in_memory_and_all_of_them_on_disk(tiny_policy: CogACT, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    evla_compile.compile(tiny_policy, evla_compile.CompileConfig.dense(ddim_steps=1)).export(folder, parts=2)
    sizes = [
        sum(path.stat().st_size for path in folder.glob(f"model.{part}.onnx*")) for part in ("perception", "action")
    ]
    request = request_for(folder, work="build", flavour="tensorrt_rtx")
    assert (request.weight_bytes, request.total_bytes) == (max(sizes), sum(sizes))


def test_a_changed_file_is_found(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["/bin/cp", "-r", str(artifact), str(copy)], check=True)
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes() + b"\0")
    (failed,) = [finding for finding in findings(request_for(copy), FACTS) if finding.status == "failed"]
    assert failed.check == "artifact"
    assert "model.onnx has" in failed.found
    # An engine runs without the graph that it was built from.
    assert {finding.status for finding in findings(request_for(copy, provider="engine"), FACTS)} == {"ok"}


def test_a_folder_without_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no compiled policy"):
        request_for(tmp_path)


# This machine


def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    facts = collect(("onnxruntime",), tmp_path)
    assert facts.python == sys.version_info[:2]
    assert facts.packages["onnxruntime"] == metadata.version("onnxruntime")
    assert "CPUExecutionProvider" in str((facts.imports["onnxruntime"].found or {})["providers"])
    assert facts.disk > 0


@pytest.mark.parametrize("name", ["session-cpu", "session-cuda"])
def test_a_session_tells_where_it_computes(name: str) -> None:
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    taken = (try_import(name).found or {})["taken"]
    assert taken == "CPUExecutionProvider" or name == "session-cuda"  # on a GPU's machine it may be taken


@pytest.mark.parametrize(
    ("program", "error"),
    [("import absent_library; found = {}", "absent_library"), ("import os; os._exit(3)", "exit status 3")],
)
def test_an_import_that_fails_or_crashes_is_told(program: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(try_import.__globals__["PROGRAMS"], "toy", program)
    assert error in (try_import("toy").error or "")


def test_a_library_that_the_loader_misses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "with error: libcublas.so.13: cannot open shared object file: No such file or directory"
    monkeypatch.setitem(
        try_import.__globals__["PROGRAMS"], "toy", f"import sys; print({message!r}, file=sys.stderr); found = {{}}"
    )
    assert try_import("toy").missing == ("libcublas.so.13",)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build", "540.4.0"),
        ("something else", None),
    ],
)
def test_the_drivers_version_is_read(text: str, version: str | None) -> None:
    assert driver_version(text) == version


def test_free_swap_is_read() -> None:
    assert free_swap("SwapTotal:  8388604 kB\nSwapFree:        1000 kB\n") == 1_024_000
    assert free_swap("MemFree: 5 kB\n") == 0


def evla(*arguments: object) -> tuple[int, str]:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evla", *map(str, arguments)])
        patch.setenv("COLUMNS", "100")
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(io.StringIO()),
            pytest.raises(SystemExit) as end,
        ):
            cli.main()
    return int(end.value.code or 0), out.getvalue()


def test_the_exit_status_says_whether_it_can(artifact: Path) -> None:
    status, out = evla("doctor", "run", "--artifact", artifact)
    assert status == 0
    assert f"can run {artifact} on cpu" in " ".join(out.split())
    status, out = evla("doctor", "run", "--artifact", artifact, "--provider", "cuda")
    assert status == 1
    assert "cannot run" in out
    assert "pip uninstall -y" in " ".join(out.split())
    assert evla("doctor", "fly")[0] == 2
    assert evla("doctor", "compile", "--provider", "engine")[0] == 2
    assert evla("doctor", "run", "--preset", "l22-t56")[0] == 2
    assert evla("doctor", "--artifact", artifact)[0] == 2
    assert evla("doctor", "run", "--artifact", artifact.parent)[0] == 2


def test_it_prints_json(artifact: Path) -> None:
    status, out = evla("doctor", "build", "--artifact", artifact, "--flavour", "tensorrt_rtx", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["can"] is True
    assert [Finding(**entry).status for entry in found["findings"]] == ["ok"] * len(found["findings"])


def test_commands_in_remedies_stay_whole(artifact: Path) -> None:
    _, out = evla("doctor", "run", "--artifact", artifact, "--provider", "cuda")
    assert any(line.endswith("pip install onnxruntime-gpu") for line in out.splitlines())


def test_without_work_it_shows_what_is_here() -> None:
    status, out = evla("doctor", "--json")
    found = json.loads(out)
    assert status == (0 if found["sound"] else 1)
    assert [entry["work"] for entry in found["works"]][:2] == ["compile", "run --provider cpu"]
    assert found["works"][1] == {"work": "run --provider cpu", "can": True, "lacks": []}
    _, shown = evla("doctor")
    assert "run --provider engine --flavour tensorrt_rtx" in shown


def test_a_size_without_artifact_is_estimated() -> None:
    status, out = evla(
        "doctor", "build", "--flavour", "tensorrt_rtx", "--size", "base", "--precision", "bfloat16", "--json"
    )
    memory = next(entry for entry in json.loads(out)["findings"] if entry["check"] == "memory")
    assert memory["found"].startswith("31.3 GB are needed")
    assert status == (0 if memory["status"] == "ok" else 1)


# A robot: no torch, no transformers, no onnx


@pytest.fixture
def robot(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `evla` in an environment with the runtime part and TensorRT-RTX alone."""
    environment = tmp_path / "environment"
    venv.EnvBuilder(symlinks=True).create(environment)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    installed = Path(np.__file__).parents[1]
    absent = ["torch", "functorch", "transformers", "onnx-", "onnx_", "onnxscript", "huggingface", "safetensors"]
    absent += ["__editable__", "evla_compile", "pip", "setuptools"]
    for path in installed.iterdir():
        if not path.name.startswith(tuple(absent)) and path.name != "onnx":
            (site_packages / path.name).symlink_to(path)
    (site_packages / "evla_compile").symlink_to(Path(evla_compile.__file__).parent)
    program = "import sys; from evla_compile.cli import main; sys.argv[0] = 'evla'; main()"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin" / "python"), "-I", "-c", program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert (
        "No module named 'torch'"
        in subprocess.run(
            [str(environment / "bin" / "python"), "-I", "-c", "import torch"],
            capture_output=True,
            text=True,
            check=False,
        ).stderr
    )
    return run


def test_build_run_and_doctor_work_without_torch(
    robot: Callable[..., subprocess.CompletedProcess[str]], artifact: Path, tiny_policy: CogACT, tmp_path: Path
) -> None:
    config = evla_compile.CompileConfig.dense(ddim_steps=1)
    copied = tmp_path / "copied"
    evla_compile.compile(tiny_policy, config).export(copied)
    checked = robot("doctor", "build", "--artifact", copied, "--flavour", "tensorrt_rtx")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    built = robot("build", copied, "--flavour", "tensorrt_rtx", "--capability", "8.9", "--capability", "12.0")
    assert built.returncode == 0, built.stderr
    words = " ".join(built.stdout.split())
    assert "built model.engine (" in words
    assert "TensorRT-RTX 1.7.1.116, compute capability 8.9, 12.0" in words
    assert robot("doctor", "run", "--artifact", copied).returncode == 0
    Image.fromarray(np.full((48, 64, 3), 90, dtype=np.uint8)).save(tmp_path / "frame.png")
    asked = ("--image", tmp_path / "frame.png", "--instruction", "open it", "--unnorm-key", "bridge_orig")
    ran = robot("run", copied, *asked, "--repeat", 3, "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert np.array(found["actions"]).shape == (16, 7)
    assert [entry["kind"] for entry in found["latency"]] == ["graph", "call"]
    refused = robot("run", copied, *asked, "--provider", "engine")
    assert refused.returncode == 2
    assert "this machine shows none" in " ".join(refused.stderr.split())

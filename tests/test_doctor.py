"""The doctor: every check through facts that a test makes up, and the commands on this machine and without torch."""

import contextlib
import io
import json
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evla_compile
from evla_compile import cli, doctor_checks
from evla_compile.doctor import findings, make_request
from evla_compile.doctor_checks import Finding, Request
from evla_compile.doctor_facts import Facts, Import, collect, try_import
from evla_compile.engine_settings import EngineSettings
from evla_compile.errors import ArtifactError
from evla_compile.model.policy import CogACT
from evla_compile.runtime.cuda import Gpu

ADA = Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="8.9", memory_bytes=24_000_000_000, driver_version="13.0")
FACTS = Facts(
    python=(3, 11),
    platform="linux-x86_64",
    jetson=None,
    packages={"onnxruntime": "1.32.0", "torch": "2.13.0", "tensorrt-rtx-cu13": "1.7.1.116"},
    imports={
        "torch": Import(found={"version": "2.13.0+cpu", "cuda": None}),
        "transformers": Import(found={"version": "5.23.0"}),
        "onnxscript": Import(found={"version": "0.7.2"}),
        "onnxruntime": Import(found={"version": "1.32.0", "providers": "CPUExecutionProvider"}),
        "tensorrt": Import(found={"version": "10.13.0"}),
        "tensorrt_rtx": Import(found={"version": "1.7.1.116"}),
    },
    gpu=ADA,
    gpu_error=None,
    memory=20_000_000_000,
    disk=50_000_000_000,
)
COMPILE = Request(work="compile", weight_bytes=9_000_000_000)
RUN = Request(work="run", weight_bytes=9_000_000_000)
CUDA = replace(RUN, provider="cuda")
ENGINE = replace(RUN, provider="engine")
BUILD = Request(work="build", weight_bytes=5_000_000_000)
NVISION = "RuntimeError: operator torchvision::nms does not exist"


def changed(**imports: Import) -> Facts:
    return replace(FACTS, imports={**FACTS.imports, **imports})


@pytest.mark.parametrize("request_", [COMPILE, RUN, BUILD, replace(BUILD, flavour="tensorrt_rtx"), ENGINE])
def test_a_machine_that_has_everything_can(request_: Request) -> None:
    found = list(findings(request_, FACTS))
    assert {finding.status for finding in found} == {"ok"}
    assert all(finding.remedy is None for finding in found)


@pytest.mark.parametrize(
    ("request_", "facts", "check", "found", "remedy"),
    [
        (RUN, replace(FACTS, python=(3, 10)), "Python", "3.10", "install Python 3.11 or newer"),
        (
            COMPILE,
            changed(torch=Import(error="No module named 'torch'")),
            "PyTorch",
            "No module",
            "pip install torch==",
        ),
        (COMPILE, changed(torch=Import(found={"version": "2.6.0", "cuda": None})), "PyTorch", "2.6.0, expected", "pip"),
        (COMPILE, changed(torch=Import(found={"version": "2.16.0", "cuda": None})), "PyTorch", "2.11 to 2.15", "pip"),
        (
            COMPILE,
            replace(changed(transformers=Import(error=NVISION)), packages={"torchvision": "0.28.0"}),
            "transformers",
            "torchvision 0.28.0 is of another build than torch",
            "pip uninstall torchvision",
        ),
        (COMPILE, changed(transformers=Import(error="No module")), "transformers", "No module", "pip install"),
        (COMPILE, changed(onnxscript=Import(error="No module")), "ONNX export", "No module", "pip install"),
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
        (RUN, changed(onnxruntime=Import(error="ImportError: libonnx")), "ONNX Runtime", "libonnx", "pip uninstall -y"),
        (BUILD, changed(tensorrt=Import(error="No module")), "TensorRT", "No module", "evla-compile[tensorrt]"),
        (
            BUILD,
            changed(tensorrt=Import(found={"version": "8.6.1"})),
            "TensorRT",
            "expected 10.3 or newer",
            "pip install",
        ),
        (
            replace(BUILD, flavour="tensorrt_rtx"),
            changed(tensorrt_rtx=Import(found={"version": "1.1.0"})),
            "TensorRT-RTX",
            "expected 1.4 or newer",
            "evla-compile[rtx]",
        ),
        (BUILD, replace(FACTS, gpu=None), "GPU", "the driver is missing, or shows no GPU", "until nvidia-smi lists"),
        (BUILD, replace(FACTS, gpu=None, gpu_error="no cuda-bindings"), "GPU", "no cuda-bindings", "cuda-bindings"),
        (
            ENGINE,
            replace(FACTS, gpu=replace(ADA, driver_version="12.6")),
            "CUDA driver",
            "supports CUDA 12.6, 13.0 is needed",
            "a driver for CUDA 13, or the packages for CUDA 12",
        ),
        (RUN, replace(FACTS, memory=8_000_000_000), "memory", "9.0 GB are needed, 8.0 GB free", "evla run --mapped"),
        (COMPILE, replace(FACTS, memory=1_000_000_000), "memory", "2.0 GB are needed", "add swap"),
        (BUILD, replace(FACTS, memory=16_000_000_000), "memory", "16.7 GB are needed, 16.0 GB free", "in more parts"),
        (
            ENGINE,
            replace(FACTS, gpu=replace(ADA, memory_bytes=8_000_000_000)),
            "memory",
            "9.0 GB are needed, 8.0 GB on the GPU",
            "a smaller preset",
        ),
        (COMPILE, replace(FACTS, disk=9_000_000_000), "disk", "9.1 GB are needed, 9.0 GB free", "make room"),
    ],
)
def test_what_is_lacking_is_found_with_its_remedy(
    request_: Request, facts: Facts, check: str, found: str, remedy: str
) -> None:
    failed = {finding.check: finding for finding in findings(request_, facts) if finding.status == "failed"}
    assert check in failed
    assert found in failed[check].found
    assert remedy in (failed[check].remedy or "")


@pytest.mark.parametrize("request_", [replace(RUN, weight_bytes=None), replace(BUILD, weight_bytes=None)])
def test_an_unknown_size_is_a_warning_that_says_how_to_name_it(request_: Request) -> None:
    found = {finding.check: finding for finding in findings(request_, FACTS)}
    assert found["memory"].status == "warning"
    assert found["memory"].remedy == "name the policy: --artifact DIR, or --size base"


def test_a_system_that_does_not_tell_its_memory_is_a_warning() -> None:
    found = {finding.check: finding for finding in findings(RUN, replace(FACTS, memory=None))}
    assert found["memory"].status == "warning"


def test_builds_take_what_the_builder_says() -> None:
    from evla_compile.exporters import to_tensorrt  # noqa: PLC0415  (the doctor must not need it)

    assert doctor_checks.BUILD_FACTOR == to_tensorrt.MEMORY_FACTOR
    assert doctor_checks.BUILD_BASE == to_tensorrt.BASE_BYTES


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
    given: dict[str, Any] = {"provider": None, "flavour": None, "weight_bytes": None} | settings
    work = given.pop("work", "run")
    return make_request(work, artifact=artifact, **given)


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
    assert failed.remedy == f"evla build {artifact} --flavour tensorrt_rtx"


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
    assert facts.packages["numpy"] == np.__version__
    assert "CPUExecutionProvider" in str((facts.imports["onnxruntime"].found or {})["providers"])
    assert facts.disk > 0


@pytest.mark.parametrize(
    ("program", "error"),
    [("import absent_library; found = {}", "absent_library"), ("import os; os._exit(3)", "exit status 3")],
)
def test_an_import_that_fails_or_crashes_is_told(program: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(try_import.__globals__["PROGRAMS"], "toy", program)
    assert error in (try_import("toy").error or "")


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
    assert evla("doctor", "run", "--artifact", artifact.parent)[0] == 2


def test_it_prints_json(artifact: Path) -> None:
    status, out = evla("doctor", "build", "--artifact", artifact, "--flavour", "tensorrt_rtx", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["can"] is True
    assert [Finding(**entry).status for entry in found["findings"]] == ["ok"] * len(found["findings"])


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

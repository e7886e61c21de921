"""`evla doctor`: check what some work needs on this machine, and name the remedies; no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from evla_compile.doctor.capacity import check_artifact, check_disk, check_engine, check_memory, check_room
from evla_compile.doctor.checks import (
    check_driver,
    check_export,
    check_gpu,
    check_provider,
    check_python,
    check_runtime_packages,
    check_tensorrt,
    check_torch,
    check_transformers,
    check_widening,
)
from evla_compile.doctor.facts import DISTRIBUTIONS, PROGRAMS, Facts, collect
from evla_compile.doctor.request import Finding, Request
from evla_compile.runtime import Provider
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.engine_settings import FLAVOURS
from evla_compile.settings.precision import PRECISION_ROWS, Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What is installed on a machine, and what can be done there."""

    findings: tuple[Finding, ...]
    """Findings of every check; what is not installed is "absent", and only what is broken has "failed"."""
    lacks: tuple[tuple[Request, tuple[str, ...]], ...]
    """Each kind of work with the checks that prevent it; no checks where it can be done."""

    def to_json(self) -> dict[str, Any]:
        """Return the survey as JSON-ready values."""
        return {
            "sound": all(finding.status != "failed" for finding in self.findings),
            "findings": [finding.to_json() for finding in self.findings],
            "works": [
                {"work": request.arguments(), "can": not lacks, "lacks": list(lacks)} for request, lacks in self.lacks
            ],
        }


def examine(request: Request) -> list[Finding]:
    """Check this machine for some work, and return the findings.

    Disk space is that of the artifact's folder, or of the current one.
    """
    folder = request.place.parent if request.place is not None else Path()
    return list(findings(request, collect(request.imports, folder)))


def findings(request: Request, facts: Facts) -> Iterator[Finding]:
    """Yield the findings of all checks that the work needs, from facts alone."""
    yield check_python(facts)
    if request.work == "compile":
        yield check_torch(facts)
        yield check_transformers(facts)
        yield check_export(facts)
    if "onnxruntime" in request.imports:
        yield check_runtime_packages(request, facts)
        yield check_provider(request, facts)
    if request.is_widened:
        yield check_widening(facts)
    if request.flavour in request.imports:
        yield check_tensorrt(request.flavour, facts)
    if request.needs_gpu:
        yield check_gpu(request, facts)
        if facts.gpu is not None:
            yield check_driver(request, facts)
    yield check_memory(request, facts)
    if request.work != "run":
        yield check_disk(request, facts)
    if request.manifest is not None:
        yield check_artifact(request)
        if request.work == "run" and request.provider == "engine":
            yield check_engine(request, facts)


def survey_machine() -> Survey:
    """Check everything on this machine, and return what can be done here."""
    return survey(collect(tuple(PROGRAMS), Path()))


def survey(facts: Facts) -> Survey:
    """Return the findings of every check, and what can be done, from facts alone."""
    lacks = []
    for request in _kinds_of_work():
        stands = (finding.check for finding in findings(request, facts) if finding.status == "failed")
        lacks.append((request, tuple(stands)))
    return Survey(findings=tuple(_inventory(facts)), lacks=tuple(lacks))


def _kinds_of_work() -> Sequence[Request]:
    providers = [provider for provider in get_args(Provider) if provider != "engine"]
    return (
        Request(work="compile"),
        *(Request(work="run", provider=provider) for provider in providers),
        *(Request(work="run", provider="engine", flavour=flavour) for flavour in FLAVOURS),
        *(Request(work="build", flavour=flavour) for flavour in FLAVOURS),
    )


def _inventory(facts: Facts) -> Iterator[Finding]:
    """Yield a finding for everything that can be installed: ok, broken or absent."""
    yield check_python(facts)
    cpu = Request(work="run")
    for name, finding in (
        ("torch", check_torch(facts)),
        ("transformers", check_transformers(facts)),
        ("onnxscript", check_export(facts)),
        ("onnxruntime", check_runtime_packages(cpu, facts)),
        ("onnxruntime", check_provider(_installed_provider(facts), facts)),
        *((flavour, check_tensorrt(flavour, facts)) for flavour in FLAVOURS),
    ):
        absent = not any(package in facts.packages for package in DISTRIBUTIONS[name])
        yield replace(finding, status="absent") if absent and finding.status == "failed" else finding
    gpu = check_gpu(Request(work="build"), facts)
    yield replace(gpu, status="absent") if facts.driver is None and gpu.status == "failed" else gpu
    yield check_room(facts)


def _installed_provider(facts: Facts) -> Request:
    """Return a request to run on the provider of the installed ONNX Runtime package; without a GPU, the CPU."""
    if "onnxruntime-gpu" in facts.packages and facts.gpu is not None:
        return Request(work="run", provider="cuda")
    return Request(work="run", provider="openvino" if "onnxruntime-openvino" in facts.packages else "cpu")


def stored_bytes(size: str, config: CompileConfig, precision: Precision) -> int:
    """Return the bytes of a policy's weights as exported; reads shapes alone, and imports torch.

    Args:
        size: `small`, `base`, `large`, or a run directory.
        config: how it is compiled.
        precision: of everything outside the action head.

    Raises:
        CheckpointError: there is no such run directory, or it is damaged.
        ValueError: the size is unknown, or a budget does not fit it.
    """
    import torch  # noqa: PLC0415  (this module must be importable without it)

    from evla_compile.estimate.comparison import sizes_of  # noqa: PLC0415
    from evla_compile.estimate.estimates import quick_estimates  # noqa: PLC0415

    width = PRECISION_ROWS[precision].bytes
    dtype = next(dtype for dtype in (torch.float32, torch.bfloat16) if dtype.itemsize == width)
    (found,) = quick_estimates(sizes_of(size), {"": config}, dtype=dtype).values()
    return found.total.weight_bytes

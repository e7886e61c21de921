"""`evla doctor`: falsifiable checks of what a piece of work needs on this machine, each with its remedy; no torch."""

from collections.abc import Iterator
from pathlib import Path

from evla_compile.artifact import find_manifest
from evla_compile.config import CompileConfig, Precision
from evla_compile.doctor_checks import (
    Finding,
    Request,
    Work,
    check_artifact,
    check_disk,
    check_driver,
    check_engine,
    check_gpu,
    check_import,
    check_memory,
    check_provider,
    check_python,
    check_runtime_packages,
    check_tensorrt,
    check_torch,
    check_transformers,
)
from evla_compile.doctor_facts import Facts, collect
from evla_compile.engine_settings import Flavour
from evla_compile.manifest import read_manifest
from evla_compile.runtime import Provider


def examine(request: Request, folder: Path) -> list[Finding]:
    """Look at this machine, and return what stands in the way of a piece of work and what does not.

    Args:
        request: the work.
        folder: where files would be written.
    """
    return list(findings(request, collect(request.imports, folder)))


def findings(request: Request, facts: Facts) -> Iterator[Finding]:
    """Yield what each check finds that the work needs, from facts alone."""
    yield check_python(facts)
    if request.work == "compile":
        yield check_torch(facts)
        yield check_transformers(facts)
        yield check_import("ONNX export", "onnxscript", facts, 'pip install "evla-compile"')
    if "onnxruntime" in request.imports:
        yield check_runtime_packages(request, facts)
        yield check_provider(request, facts)
    if request.flavour in request.imports:
        yield check_tensorrt(request, facts)
    if request.needs_gpu:
        yield check_gpu(facts)
        if facts.gpu is not None:
            yield check_driver(facts)
    yield check_memory(request, facts)
    if request.work != "run":
        yield check_disk(request, facts)
    if request.manifest is not None and request.place is not None:
        yield check_artifact(request)
        if request.work == "run" and request.provider == "engine" and facts.gpu is not None:
            yield check_engine(request, facts)


def make_request(
    work: Work,
    *,
    provider: Provider | None,
    flavour: Flavour | None,
    artifact: Path | None,
    weight_bytes: int | None,
) -> Request:
    """Return a request, completed by what an artifact says of itself.

    Raises:
        ArtifactError: there is no artifact where one was named, or its manifest is damaged.
    """
    if artifact is None:
        return Request(
            work=work,
            provider=provider or "cpu",
            flavour=flavour or "tensorrt",
            weight_bytes=weight_bytes,
        )
    place = find_manifest(artifact)
    manifest = read_manifest(place)
    sizes = [sum(record.size for record in part.files) for part in manifest.parts]
    chosen = provider or ("engine" if artifact.suffix == ".engine" else "cpu")
    if chosen == "engine" and manifest.engine is not None:
        sizes = [record.size for record in manifest.engine.files]
    return Request(
        work=work,
        provider=chosen,
        flavour=flavour or (manifest.engine.flavour if manifest.engine is not None else "tensorrt"),
        manifest=manifest,
        place=place,
        weight_bytes=max(sizes) if work == "build" else sum(sizes),
    )


def stored_bytes(size: str, preset: str | None, precision: Precision) -> int:
    """Return the bytes of a policy's weights as exported; reads shapes alone, and imports torch.

    Args:
        size: `small`, `base`, `large`, or a run directory.
        preset: one of `PRESETS`, `dense`, or None for the paper's headline row.
        precision: of everything outside the action head.

    Raises:
        CheckpointError: the run directory is none.
        ValueError: the size or the preset is unknown.
    """
    import torch  # noqa: PLC0415  (this module must be importable without it)

    from evla_compile.comparison import sizes_of  # noqa: PLC0415
    from evla_compile.estimate import quick_estimates  # noqa: PLC0415

    config = CompileConfig.dense() if preset == "dense" else CompileConfig.preset(preset or "l22-t56")
    dtype = torch.float32 if precision == "float32" else torch.bfloat16  # float16 is as wide
    (found,) = quick_estimates(sizes_of(size), {"": config}, dtype=dtype).values()
    return found.total.weight_bytes

"""What `evla doctor` is asked, and what it answers; no torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from evla_compile.artifact.files import find_manifest
from evla_compile.artifact.manifest import Manifest, read_manifest
from evla_compile.runtime import Provider
from evla_compile.runtime.providers import is_widened
from evla_compile.settings.config import Precision
from evla_compile.settings.engine_settings import FLAVOUR_NAMES, Flavour

Work: TypeAlias = Literal["compile", "run", "build"]
"""What is going to be done here."""

Status: TypeAlias = Literal["ok", "warning", "failed", "absent"]
"""Outcome of a check: only a failed one stands in the way; what is absent does so where some work needs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked: whether some work can be done here."""

    work: Work
    """What."""
    provider: Provider = "cpu"
    """For `run`: where to compute."""
    flavour: Flavour = "tensorrt"
    """For `build`, and to run an engine: the library."""
    precision: Precision = "float32"
    """That of the policy."""
    manifest: Manifest | None = None
    """The artifact in question, if there is one."""
    place: Path | None = None
    """Its manifest's file."""
    weight_bytes: int | None = None
    """Bytes of the weights that the work handles at a time: of the largest part for `build`, of all of them for other
    work; None if unknown."""
    total_bytes: int | None = None
    """Bytes of the weights of all parts; None if unknown."""

    @property
    def needs_gpu(self) -> bool:
        """Whether the work is done on a GPU of this machine."""
        if self.work == "build":
            return self.flavour == "tensorrt"
        return self.work == "run" and self.provider in ("cuda", "tensorrt", "engine")

    @property
    def is_widened(self) -> bool:
        """Whether the policy will run in float32 arithmetic though it is of bfloat16."""
        return self.work == "run" and is_widened(self.provider, self.precision)

    @property
    def imports(self) -> tuple[str, ...]:
        """What must be importable for it."""
        if self.work == "compile":
            return "torch", "transformers", "onnxscript", "onnxruntime", "session-cpu"
        if self.work == "build" or self.provider == "engine":
            return (self.flavour,)
        return ("onnxruntime", f"session-{self.provider}", *(("onnx",) if self.is_widened else ()))

    def describe(self) -> str:
        """Return what is asked, in words."""
        about = "policies" if self.place is None else str(self.place.parent)
        if self.work == "run":
            return f"run {about} " + ("as an engine" if self.provider == "engine" else f"on {self.provider}")
        if self.work == "build":
            return f"build an engine of {about} with {FLAVOUR_NAMES[self.flavour]}"
        return "compile policies"

    def arguments(self) -> str:
        """Return what asks `evla doctor` it, of no policy in particular."""
        provider = f" --provider {self.provider}" if self.work == "run" else ""
        engine = self.work == "build" or self.provider == "engine"
        return f"{self.work}{provider}" + (f" --flavour {self.flavour}" if engine else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    """What was looked at."""
    status: Status
    """Whether it stands in the way."""
    found: str
    """What is there."""
    remedy: str | None = None
    """What to do: a command where one does it."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON-ready values."""
        return asdict(self)


def ok(check: str, found: str) -> Finding:
    """Return a finding that stands in nobody's way."""
    return Finding(check=check, status="ok", found=found)


def warned(check: str, found: str, remedy: str | None) -> Finding:
    """Return a finding that one should know of."""
    return Finding(check=check, status="warning", found=found, remedy=remedy)


def failed(check: str, found: str, remedy: str) -> Finding:
    """Return a finding that stands in the way."""
    return Finding(check=check, status="failed", found=found, remedy=remedy)


def make_request(
    work: Work,
    *,
    provider: Provider | None = None,
    flavour: Flavour | None = None,
    artifact: Path | None = None,
    weight_bytes: int | None = None,
    precision: Precision = "float32",
) -> Request:
    """Return a request, completed by what an artifact says of itself.

    Args:
        work: what is going to be done.
        provider: for "run"; None for the one that `evla run` would take.
        flavour: for "build" and to run engines; None for that of the artifact's engine, or TensorRT.
        artifact: the policy to run or to build an engine of.
        weight_bytes: without an artifact, size of the policy in one part.
        precision: likewise its precision.

    Raises:
        ArtifactError: there is no artifact where one was named, or its manifest is damaged.
        ValueError: an argument is not for this work, or contradicts the artifact.
    """
    is_engine = artifact is not None and artifact.suffix == ".engine"
    chosen = provider or ("engine" if work == "run" and is_engine else "cpu")
    if provider is not None and work != "run":
        raise ValueError(f"--provider {provider} with {work}: it is for evla doctor run; leave it out")
    if flavour is not None and work != "build" and chosen != "engine":
        raise ValueError(f"--flavour {flavour}: it is for evla doctor build, and run --provider engine; leave it out")
    if artifact is None:
        return Request(
            work=work,
            provider=chosen,
            flavour=flavour or "tensorrt",
            precision=precision,
            weight_bytes=weight_bytes,
            total_bytes=weight_bytes,
        )
    if work == "compile" or weight_bytes is not None:
        raise ValueError(f"--artifact {artifact}: it is for run and build, and has its size; leave it or --size out")
    return _about(artifact, work, chosen, flavour)


def _about(artifact: Path, work: Work, provider: Provider, flavour: Flavour | None) -> Request:
    place = find_manifest(artifact)
    manifest = read_manifest(place)
    built = manifest.engine.flavour if manifest.engine is not None else None
    sizes = [sum(record.size for record in part.files) for part in manifest.parts]
    if provider == "engine" and manifest.engine is not None:
        if flavour not in (None, built):
            raise ValueError(f"--flavour {flavour}: the engine in {place.parent} is of {built}; leave it out")
        sizes = [record.size for record in manifest.engine.files]
    return Request(
        work=work,
        provider=provider,
        flavour=flavour or built or "tensorrt",
        precision=manifest.precision,
        manifest=manifest,
        place=place,
        weight_bytes=max(sizes) if work == "build" else sum(sizes),
        total_bytes=sum(sizes),
    )

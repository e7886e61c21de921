"""The request to `evla doctor`, and its findings; no torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from evla_compile.artifact.files import find_manifest
from evla_compile.artifact.manifest import Manifest, read_manifest
from evla_compile.runtime import Provider
from evla_compile.runtime.providers import is_widened
from evla_compile.settings.engine_settings import FLAVOUR_NAMES, Flavour
from evla_compile.settings.precision import Precision

Work: TypeAlias = Literal["compile", "run", "build"]
"""Kind of work: compile a policy, run it, or build its engines."""

Status: TypeAlias = Literal["ok", "warning", "failed", "absent"]
"""Outcome of a check. Only "failed" prevents the work; in a survey, "absent" is software that is not installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The question whether some work can be done on this machine."""

    work: Work
    """Kind of work."""
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
    """Bytes of the weights that are in memory at a time: of the largest part for `build`, of all parts for other work;
    None if unknown."""
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
        """Whether this is a bfloat16 policy that will run in float32 arithmetic."""
        return self.work == "run" and is_widened(self.provider, self.precision)

    @property
    def imports(self) -> tuple[str, ...]:
        """Names of `PROGRAMS` that must succeed."""
        if self.work == "compile":
            return "torch", "transformers", "onnxscript", "onnxruntime", "session-cpu"
        if self.work == "build" or self.provider == "engine":
            return (self.flavour,)
        return ("onnxruntime", f"session-{self.provider}", *(("onnx",) if self.is_widened else ()))

    def describe(self) -> str:
        """Return the request in words."""
        about = "policies" if self.place is None else str(self.place.parent)
        if self.work == "run":
            return f"run {about} " + ("as an engine" if self.provider == "engine" else f"on {self.provider}")
        if self.work == "build":
            return f"build an engine of {about} with {FLAVOUR_NAMES[self.flavour]}"
        return "compile policies"

    def arguments(self) -> str:
        """Return the arguments of `evla doctor` for this request, without a policy."""
        provider = f" --provider {self.provider}" if self.work == "run" else ""
        engine = self.work == "build" or self.provider == "engine"
        return f"{self.work}{provider}" + (f" --flavour {self.flavour}" if engine else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Result of one check."""

    check: str
    """Name of the check."""
    status: Status
    """Outcome."""
    found: str
    """What the check found."""
    remedy: str | None = None
    """What to do about it, as a command where possible."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON-ready values."""
        return asdict(self)


def ok(check: str, found: str) -> Finding:
    """Return a finding of a check that passed."""
    return Finding(check=check, status="ok", found=found)


def warned(check: str, found: str, remedy: str | None) -> Finding:
    """Return a finding that does not prevent the work."""
    return Finding(check=check, status="warning", found=found, remedy=remedy)


def failed(check: str, found: str, remedy: str) -> Finding:
    """Return a finding that prevents the work."""
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
    """Return a request, completed from the manifest of an artifact.

    Args:
        work: kind of work.
        provider: for "run"; None for the one that `evla run` would use.
        flavour: for "build" and to run engines; None for that of the artifact's engine, or TensorRT.
        artifact: the policy to run or to build an engine of.
        weight_bytes: without an artifact, size of the policy in one part.
        precision: without an artifact, precision of the policy.

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

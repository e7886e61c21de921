"""Build a TensorRT or TensorRT-RTX engine from an ONNX file; needs neither torch nor onnx.

Networks are strongly typed: the casts in the file decide the precision, and no flag of the builder changes it. All
shapes are static, so there are no optimisation profiles.
"""

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evla_compile.errors import EvlaError, ExportError
from evla_compile.exporters.build_progress import watching
from evla_compile.memory import BUILD_BASE_BYTES, BUILD_FACTOR, available_memory, build_bytes
from evla_compile.scratch import replacing
from evla_compile.settings.engine_settings import FLAVOUR_NAMES, EngineSettings, Flavour
from evla_compile.tensorrt.library import (
    create,
    describe_tensor,
    find_flavour,
    first_line,
    import_flavour,
    make_logger,
    reasons,
)
from evla_compile.units import bytes_text

_JETSON_MARK = Path("/etc/nv_tegra_release")
_OUT_OF_MEMORY = re.compile(r"out.?of.?memory|bad_alloc|insufficient (memory|workspace)|cannot allocate", re.IGNORECASE)
_NO_KERNEL = "could not find any implementation"
_NEW_OPERATORS = ("Attention", "RMSNormalization")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """The network that an engine was built from."""

    layers: int
    """Layers of the network, as the parser created them."""
    attentions: int
    """Attention layers among them; they may be decomposed where no dedicated kernel fits."""
    inputs: tuple[str, ...]
    """Input tensors, in the form of `str(TensorSpec)`."""
    outputs: tuple[str, ...]
    """Output tensors, in the same form."""


def to_tensorrt(model: Path, engine: Path, settings: EngineSettings, *, progress: bool = False) -> BuiltEngine:
    """Build an engine.

    Args:
        model: the ONNX file, its external data beside it.
        engine: where to write the engine.
        settings: what to build it for.
        progress: whether to draw progress bars on standard error.

    Raises:
        EvlaError: the library is missing or too old, or memory is short, before or during the build.
        ExportError: the parser refuses a node, which the message names, a shape is dynamic, or the builder fails.
        ValueError: the library does not have a setting.
    """
    flavour = find_flavour(settings)
    trt = import_flavour(flavour)
    check_memory(model, settings)
    log = make_logger(trt)
    builder = create(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, model, log, flavour)
    built = BuiltEngine(
        layers=network.num_layers,
        attentions=_allow_decomposition(trt, network),
        inputs=_signature(network.get_input, network.num_inputs, model),
        outputs=_signature(network.get_output, network.num_outputs, model),
    )
    config = _configure(trt, builder, settings, log)
    with watching(trt, config, f"Building {engine.name}", shown=progress):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise build_error(model, log.errors, flavour)
    with engine.open("wb") as file:
        file.write(plan)
    if settings.timing_cache is not None:
        _write_timing_cache(config, settings.timing_cache)
    return built


def check_memory(model: Path, settings: EngineSettings) -> None:
    """Refuse a build that would run out of memory, before it starts.

    Raises:
        EvlaError: the message says what it needs, what there is, and what to do.
    """
    data = model.with_name(f"{model.name}.data")
    weights = sum(file.stat().st_size for file in (model, data) if file.exists())
    needed = build_bytes(weights)
    limit = settings.memory_bytes if settings.memory_bytes is not None else available_memory()
    if limit is None or needed <= limit:
        return
    raise EvlaError(
        f"building {model.name} takes about {bytes_text(needed)} ({BUILD_FACTOR} times its {bytes_text(weights)} of"
        f" weights, and {bytes_text(BUILD_BASE_BYTES)}), and {bytes_text(limit)} are free: export it in more parts"
        " (parts= beside precision=, or evla compile --parts), add swap, or build on a larger machine"
    )


def _parse(trt: Any, network: Any, model: Path, log: Any, flavour: Flavour) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(model)):
        return
    name = f"{FLAVOUR_NAMES[flavour]} {trt.__version__}"
    if any(_OUT_OF_MEMORY.search(error) for error in log.errors):
        raise build_error(model, log.errors, flavour)
    if not parser.num_errors or not parser.get_error(0).node_operator():
        raise ExportError(f"{name} cannot read {model}: {reasons(log.errors)}")
    error = parser.get_error(0)
    module, _, rest = error.node_name().rpartition("/")
    writer, dot, _ = rest.rpartition(".")
    origin = (module or "the graph itself") + (f", written by {writer}," if dot else "")
    hint = ": export with an opset that has no such operator, opset=20 for instance"
    raise ExportError(
        f"{name} refuses the {error.node_operator()} node {error.node_name()!r} of {origin} in"
        f" {model.name}: {first_line(error.desc())}{hint if error.node_operator() in _NEW_OPERATORS else ''}"
    )


def _allow_decomposition(trt: Any, network: Any) -> int:
    """Let attention be computed by several kernels where no dedicated one fits, as in float32; return their number."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None:
        return 0  # older libraries have no attention layers
    found = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
            found += 1
    return found


def _signature(get: Any, count: int, model: Path) -> tuple[str, ...]:
    found = []
    for index in range(count):
        tensor = get(index)
        shape = tuple(tensor.shape)
        if any(size < 1 for size in shape):
            raise ExportError(
                f"{model.name}: {tensor.name} has the dynamic shape {list(shape)}, and engines are static: export the"
                " policy by evla_compile, or fix the file's shapes"
            )
        found.append(describe_tensor(tensor.name, tensor.dtype, shape))
    return tuple(found)


def _configure(trt: Any, builder: Any, settings: EngineSettings, log: Any) -> Any:
    config = builder.create_builder_config()
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for index, capability in enumerate(settings.compute_capabilities):
            value = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
            if not config.set_compute_capability(value, index):
                raise ExportError(
                    f"TensorRT-RTX does not take the compute capability {capability}: {reasons(log.errors)}"
                )
    if settings.hardware_compatible:
        if platform.machine() == "aarch64" and _JETSON_MARK.exists():
            raise ValueError(
                "hardware_compatible=True: TensorRT has no such engines on a Jetson; build on every robot, or copy an"
                " engine between modules of one kind with one JetPack"
            )
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.timing_cache is not None:
        _read_timing_cache(config, settings.timing_cache, log)
    return config


def _read_timing_cache(config: Any, path: Path, log: Any) -> None:
    """Give the builder the measurements of earlier builds; refuse a file that it would silently ignore."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # where it is written in the end, hours later
        known = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise EvlaError(f"timing cache {path} cannot be used: {error}; name another file") from error
    log.warnings.clear()
    cache = config.create_timing_cache(known)
    taken = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
    refused = [message for message in log.warnings if "timing cache" in message.lower()] if known else []
    if not taken or refused:
        raise EvlaError(
            f"timing cache {path} is refused ({reasons([*log.errors, *refused])}): it is damaged, or of another GPU or"
            " version; delete it, or name another file"
        )


def _write_timing_cache(config: Any, path: Path) -> None:
    try:
        with replacing(path) as new:
            new.write_bytes(bytes(config.get_timing_cache().serialize()))
    except OSError as error:
        raise EvlaError(f"timing cache {path} cannot be written: {error}; name another file") from error


def build_error(model: Path, errors: list[str], flavour: Flavour) -> EvlaError:
    """Return the error for a failed build, from the library's messages; running out of memory is reported as such."""
    name, why = FLAVOUR_NAMES[flavour], reasons(errors)
    if any(_OUT_OF_MEMORY.search(error) for error in errors):
        return EvlaError(
            f"{name} ran out of memory building {model.name} ({why}): export it in more parts, in half precision,"
            " lower the workspace, add swap, or build on a larger machine"
        )
    advice = ""
    if any(_NO_KERNEL in error.lower() for error in errors):
        advice = "; it also says so when memory is short: try a smaller workspace, more parts, or a larger machine"
    return ExportError(f"{name} cannot build {model.name}: {why}{advice}")

"""The checks of `evla doctor` on memory, disk, an artifact's files and an engine's GPU; no torch."""

import math
from pathlib import Path

from evla_compile.artifact.files import ROOM_BYTES, check_files
from evla_compile.artifact.manifest import Manifest
from evla_compile.doctor.facts import Facts
from evla_compile.doctor.request import Finding, Request, failed, ok, warned
from evla_compile.errors import EvlaError
from evla_compile.memory import BUILD_BASE_BYTES, BUILD_FACTOR, build_bytes
from evla_compile.runtime.engine_match import build_command, check_match, require_engine
from evla_compile.runtime.widening import FACTOR
from evla_compile.units import bytes_text

COMPILE_BYTES = 2_000_000_000
"""Memory for compiling and exporting, without the mapped checkpoint, of any size; 1.3 GB were measured."""

_MOST_PARTS = 6
"""More parts do not help: the largest is then the one with vision, which is not cut."""

_NAME_IT = "name the policy: --artifact DIR, or --size base"


def check_room(facts: Facts) -> Finding:
    """Report free memory, swap and disk."""
    memory = "an unknown amount of" if facts.memory is None else bytes_text(facts.memory)
    return ok("room", f"free: {memory} memory, {bytes_text(facts.swap)} swap, {bytes_text(facts.disk)} disk")


def check_memory(request: Request, facts: Facts) -> Finding:
    """Check that the work's memory is free: on the GPU for what runs there, else on the machine."""
    free, where = _free_memory(request, facts)
    if free is None:
        return warned("memory", f"what is free {where} is unknown", None)
    if request.work == "compile":
        return _check_compile_memory(free + facts.swap)
    if request.weight_bytes is None:
        return warned("memory", f"{bytes_text(free)} free {where}; what is needed is unknown", _NAME_IT)
    if request.work == "build":
        return _check_build_memory(request, free, facts.swap)
    needed = FACTOR * request.weight_bytes if request.is_widened else request.weight_bytes
    found = f"{bytes_text(needed)} are needed, {bytes_text(free)} free {where}"
    if needed <= free:
        return ok("memory", found)
    mapped = "evla run --mapped, which leaves the weights in their file, or a smaller preset"
    halved = "evla compile --precision bfloat16, or " if request.precision == "float32" else ""
    smaller = f"{halved}a smaller preset"
    return failed("memory", found, mapped if request.provider == "cpu" else smaller)


def check_disk(request: Request, facts: Facts) -> Finding:
    """Check that the disk has room for the files written: the weights of every part once."""
    if request.total_bytes is None:
        return warned("disk", f"{bytes_text(facts.disk)} free; what is needed is unknown", _NAME_IT)
    needed = request.total_bytes + ROOM_BYTES
    found = f"{bytes_text(needed)} are needed, {bytes_text(facts.disk)} free"
    if needed > facts.disk:
        return failed("disk", found, "make room, or choose a folder on another disk")
    return ok("disk", found)


def check_artifact(request: Request) -> Finding:
    """Check that the files to be read have the hashes of the manifest.

    Raises:
        ValueError: no artifact was named.
    """
    manifest, place = _known(request)
    engines = manifest.engine.files if manifest.engine is not None else ()
    if request.work == "run" and request.provider == "engine":
        files = (*engines, manifest.tokenizer)
    elif request.work == "build":
        files = tuple(record for part in manifest.parts for record in part.files)
    else:
        files = tuple(record for record in manifest.files if record not in engines)
    try:
        check_files(files, place.parent)
    except EvlaError as error:
        return failed("artifact", str(error), "copy the artifact again, or compile the policy again")
    return ok("artifact", f"{len(files)} files as the manifest says")


def check_engine(request: Request, facts: Facts) -> Finding:
    """Check that there is an engine for this GPU, library and platform.

    Raises:
        ValueError: no artifact was named.
    """
    manifest, place = _known(request)
    tried = facts.imports[request.flavour]
    try:
        record = require_engine(manifest, place)
        if tried.found is None or facts.gpu is None:
            return warned("engine", "what it is for cannot be compared: see the library and the GPU", None)
        check_match(record, str(tried.found["version"]), facts.gpu, place)
    except EvlaError as error:
        return failed("engine", str(error), build_command(request.flavour, place, facts.gpu))
    return ok("engine", "for this GPU, library and platform")


def _check_compile_memory(free: int) -> Finding:
    found = f"{bytes_text(COMPILE_BYTES)} are needed, {bytes_text(free)} free with swap"
    return (
        ok("memory", found) if free >= COMPILE_BYTES else failed("memory", found, "close other programs, or add swap")
    )


def _check_build_memory(request: Request, free: int, swap: int) -> Finding:
    """Compare a build's estimate with free memory; `evla build` ignores swap unless --memory-gb says otherwise."""
    weights, total = request.weight_bytes or 0, request.total_bytes or 0
    needed = build_bytes(weights)
    found = f"{bytes_text(needed)} are needed, {bytes_text(free)} free"
    if needed <= free:
        return ok("memory", found)
    command = build_command(request.flavour, request.place or Path("DIR/manifest.json"))
    insist = f"{command} --memory-gb {math.ceil(needed / 1e9)}"
    if needed <= free + swap:
        return warned("memory", f"{found}, {bytes_text(free + swap)} with swap: slow", insist)
    remedy = f"add {bytes_text(needed - free - swap)} of swap on a fast disk, and then {insist}"
    room = (free - BUILD_BASE_BYTES) / BUILD_FACTOR
    # One part is the action head; perception is cut into the others, which have about equal weights.
    parts = max(2, math.ceil(1.1 * total / room) + 1) if room > 0 else _MOST_PARTS + 1
    if parts <= _MOST_PARTS:
        remedy = f"compile again with evla compile --parts {parts}; or {remedy}"
    return failed("memory", found, remedy)


def _free_memory(request: Request, facts: Facts) -> tuple[int | None, str]:
    """Return the free bytes for the work, and where; a Jetson's GPU uses the machine's memory."""
    if request.needs_gpu and request.work == "run" and facts.jetson is None:
        return (None if facts.gpu is None else facts.gpu.memory_bytes), "on the GPU"
    return facts.memory, "on the machine"


def _known(request: Request) -> tuple[Manifest, Path]:
    if request.manifest is None or request.place is None:
        raise ValueError("this check needs an artifact")
    return request.manifest, request.place

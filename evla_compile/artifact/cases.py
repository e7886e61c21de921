"""Inputs and outputs of the torch graph, recorded at export to verify runtimes with; no torch.

A file of recorded cases may come from anywhere: nothing is allocated for it before its headers have been checked.
"""

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray

from evla_compile.artifact.manifest import Manifest
from evla_compile.artifact.records import TensorSpec
from evla_compile.errors import ArtifactError
from evla_compile.host.inputs import GraphInputs
from evla_compile.settings.anatomy import COGACT, LAYERS

PROBED = 4096
"""Elements recorded of a stage, at most."""
MOST_CASES = 64
"""Cases in a file, at most."""
MOST_BYTES = 2**30
"""Bytes of one recorded array, at most."""

_KEY = re.compile(r"(\d{1,2})/(inputs|outputs|stages)/([\w.-]{1,80})\.npy", re.ASCII)
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_STAGE_HEADER = re.compile(r"\{'descr': '<f4', 'fortran_order': False, 'shape': \((\d{1,4}),\), \}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedCase:
    """One call of the graph."""

    inputs: GraphInputs
    """What the graph was given."""
    outputs: Mapping[str, NDArray[Any]]
    """What the float32 torch graph returned for them, by name."""
    stages: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Samples of values within the graph, by stage; see `probe`."""


def probe(stage: str, value: NDArray[Any], text_tokens: int) -> NDArray[Any]:
    """Return evenly spread elements of a stage, at most `PROBED`, to compare two lowerings by.

    Of a decoder layer only the text rows are used, which are the last of the sequence: two lowerings may keep different
    visual tokens, and then the rows in front belong to different patches.

    Args:
        stage: its name.
        value: array [B,...]; of a decoder layer [B,S,D].
        text_tokens: T, the text budget.
    """
    if stage.startswith(f"{LAYERS}."):
        value = value[:, 1 - text_tokens :]
    flat = value.reshape(-1)
    stride = -(-flat.size // PROBED) | 1  # odd, or it would meet the same channels of every row
    return flat[::stride].copy()


def write_cases(cases: Sequence[RecordedCase], path: Path) -> None:
    """Write cases as a compressed npz file with keys such as "0/inputs/image"."""
    arrays = {
        f"{number}/{kind}/{name}": np.ascontiguousarray(array)
        for number, case in enumerate(cases)
        for kind, side in (("inputs", case.inputs.by_name), ("outputs", case.outputs), ("stages", case.stages))
        for name, array in side.items()
    }
    # No allow_pickle=, which older numpy takes for an array; all of these are numbers.
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy types the keywords as its own options


def read_cases(path: Path, manifest: Manifest) -> list[RecordedCase]:
    """Read a file that `write_cases` wrote for the policy of a manifest.

    Raises:
        ArtifactError: the file cannot be read, or has no cases of such a policy: an array is missing, of another
            dtype or shape, or out of its range.
    """
    arrays: dict[int, dict[str, dict[str, NDArray[Any]]]] = {}
    known = _known_arrays(manifest)
    try:
        with ZipFile(path) as archive:
            for entry in archive.infolist():
                match = _KEY.fullmatch(entry.filename)
                if match is None or int(match[1]) >= MOST_CASES:
                    raise ValueError(f"it holds {entry.filename!r:.100}")
                sides = arrays.setdefault(int(match[1]), {"inputs": {}, "outputs": {}, "stages": {}})
                if match[3] in sides[match[2]]:
                    raise ValueError(f"it holds {entry.filename} twice")
                sides[match[2]][match[3]] = _read_array(archive, entry, known.get((match[2], match[3])))
        if not arrays or sorted(arrays) != list(range(len(arrays))):
            raise ValueError(f"it holds the cases {sorted(arrays)}, expected them from 0 on")
        cases = [_to_case(number, arrays[number], manifest) for number in range(len(arrays))]
    except (OSError, ValueError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
        raise ArtifactError(f"recorded cases {path}: {error}; compile the policy again") from error
    return cases


def recorded_stages(manifest: Manifest) -> tuple[str, ...]:
    """Return the stages that every export records, as outputs or samples, in data-flow order."""
    numbers: dict[str, Iterable[int]] = {
        "layer": manifest.plan.keep_layers,
        "step": range(manifest.config.denoising_steps - 1),  # what the last step yields are the samples
    }
    names: list[str] = []
    for stage in COGACT.stages:
        row = [stage.name] if stage.numbered is None else [f"{stage.name}.{n}" for n in numbers[stage.numbered]]
        names.extend(row)
    return tuple(names)


def _known_arrays(manifest: Manifest) -> dict[tuple[str, str], TensorSpec]:
    sides: dict[str, Iterable[TensorSpec]] = {"inputs": manifest.inputs, "outputs": manifest.outputs}
    return {(kind, spec.name): spec for kind, specs in sides.items() for spec in specs}


def _read_array(archive: ZipFile, entry: ZipInfo, spec: TensorSpec | None) -> NDArray[Any]:
    """Read one npy file: an array of `spec`, or the samples of a stage where that is None."""
    if entry.flag_bits & 1 or entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise ValueError(f"{entry.filename} is encrypted or compressed by a method other than deflate")
    with archive.open(entry) as file:
        start = file.read(len(_NPY_MAGIC) + 2)
        if start[:-2] != _NPY_MAGIC:
            raise ValueError(f"{entry.filename} is no array in numpy's format 1.0")
        header = file.read(int.from_bytes(start[-2:], "little")).decode("latin1").rstrip()
        dtype, shape = _expected_form(header, spec)
        if header != _npy_header(dtype, shape):
            expected = "float32[N] of at most 4096 elements" if spec is None else spec
            raise ValueError(f"{entry.filename} has the header {header!r:.100}: expected {expected}")
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if size > MOST_BYTES:
            raise ValueError(f"{entry.filename} would have {size} bytes: expected at most {MOST_BYTES}")
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{entry.filename} has not the {size} bytes of its header")
    return np.frombuffer(content, dtype=dtype).reshape(shape).copy()


def _expected_form(header: str, spec: TensorSpec | None) -> tuple[np.dtype[Any], tuple[int, ...]]:
    if spec is not None:
        return np.dtype(spec.dtype), spec.shape
    match = _STAGE_HEADER.fullmatch(header)
    return np.dtype("float32"), (min(max(int(match[1]), 1), PROBED) if match else 1,)


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    return f"{{'descr': {np.lib.format.dtype_to_descr(dtype)!r}, 'fortran_order': False, 'shape': {shape!r}, }}"


def _to_case(number: int, sides: Mapping[str, Mapping[str, NDArray[Any]]], manifest: Manifest) -> RecordedCase:
    """Return the arrays of a case; refuse missing ones, and values that a policy never takes or returns."""
    for kind, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        if sides[kind].keys() != {spec.name for spec in specs}:
            names = sorted(sides[kind])
            raise ValueError(f"case {number} has the {kind} {names}: expected {', '.join(map(str, specs))}")
    case = RecordedCase(inputs=GraphInputs(**sides["inputs"]), outputs=sides["outputs"], stages=sides["stages"])
    missing = set(recorded_stages(manifest)) - case.stages.keys() - case.outputs.keys()
    if missing:
        raise ValueError(f"case {number} lacks {', '.join(sorted(missing))}, so it would not prove every stage")
    case.inputs.check(manifest.signature)
    check_finite(case, f"case {number}")
    return case


def check_finite(case: RecordedCase, place: str) -> None:
    """Refuse a case with values that are not finite, since nothing can be compared with them.

    Args:
        case: inputs, outputs and stages.
        place: where they are from, for the message.

    Raises:
        ValueError: a value is infinite or not a number; the message names the first array with one, in data-flow order.
    """
    for name, array in (*case.inputs.by_name.items(), *case.stages.items(), *case.outputs.items()):
        wrong = np.count_nonzero(~np.isfinite(array)) if array.dtype.kind == "f" else 0
        if wrong:
            raise ValueError(f"{place}: {wrong} of {array.size} values of {name} are infinite or not a number")

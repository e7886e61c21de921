"""Inputs and outputs of the torch graph, recorded at export, against which a runtime is verified; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from evla_compile.errors import ArtifactError
from evla_compile.tolerances import relative_error

PROBED = 4096
"""Most elements recorded of a stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedCase:
    """One call of the graph."""

    inputs: Mapping[str, NDArray[Any]]
    """Inputs by name, as the graph takes them."""
    outputs: Mapping[str, NDArray[Any]]
    """What the float32 torch graph returned for them, by name."""
    stages: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Samples of what it computed on the way, by stage; see `probe`."""


def probe(stage: str, value: NDArray[Any], text_tokens: int) -> NDArray[Any]:
    """Return evenly spread elements of a stage, at most `PROBED`, to compare two lowerings by.

    Of a decoder layer only the rows of the text count, which stand at the end of the sequence: where two lowerings keep
    different visual tokens, the rows before are those of different patches.

    Args:
        stage: its name.
        value: array [B,...]; of a decoder layer [B,S,D].
        text_tokens: T, the text budget.
    """
    if stage.startswith("layers."):
        value = value[:, 1 - text_tokens :]
    flat = value.reshape(-1)
    stride = -(-flat.size // PROBED) | 1  # odd, or it would meet the same channels of every row
    return flat[::stride].copy()


def write_cases(cases: Sequence[RecordedCase], path: Path) -> None:
    """Write cases as a compressed npz file with keys such as "0/inputs/image"."""
    arrays = {
        f"{number}/{kind}/{name}": array
        for number, case in enumerate(cases)
        for kind, side in (("inputs", case.inputs), ("outputs", case.outputs), ("stages", case.stages))
        for name, array in side.items()
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)


def read_cases(path: Path) -> list[RecordedCase]:
    """Read a file that `write_cases` wrote.

    Raises:
        ArtifactError: the file cannot be read or holds no cases.
    """
    cases: dict[int, dict[str, dict[str, NDArray[Any]]]] = {}
    try:
        # opened here: numpy leaves a file open that turns out to be a damaged archive
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for key in arrays.files:
                number, kind, name = key.split("/")
                cases.setdefault(int(number), {"inputs": {}, "outputs": {}, "stages": {}})[kind][name] = arrays[key]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ArtifactError(f"recorded cases {path} cannot be read: {error}; compile the policy again") from error
    if not cases:
        raise ArtifactError(f"recorded cases {path}: it holds none; compile the policy again")
    return [RecordedCase(**sides) for _, sides in sorted(cases.items())]


def stage_errors(case: RecordedCase, found: Mapping[str, NDArray[Any]], text_tokens: int) -> dict[str, float]:
    """Return how far each stage and output is from what was recorded, in data-flow order.

    Floating-point values are measured by `relative_error`; whole numbers, which are indices of patches, by the share of
    those expected that are not among those found.

    Args:
        case: what was recorded.
        found: values by name, whole; those that were not recorded are passed over.
        text_tokens: T, the text budget.

    Raises:
        ValueError: a shape differs, or a value is not finite; the message names the stage.
    """
    errors = {}
    for name, expected in (*case.stages.items(), *case.outputs.items()):
        if name not in found:
            continue
        value = probe(name, found[name], text_tokens) if name in case.stages else found[name]
        measure = _missing_share if expected.dtype.kind == "i" else relative_error
        try:
            errors[name] = measure(value, expected)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return errors


def _missing_share(found: NDArray[Any], expected: NDArray[Any]) -> float:
    rows = zip(found.reshape(len(found), -1), expected.reshape(len(expected), -1), strict=True)
    return max(1.0 - float(np.isin(wanted, row).mean()) for row, wanted in rows)

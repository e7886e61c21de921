"""Inputs and outputs of the torch graph, recorded at export, against which a runtime is verified; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from evla_compile.errors import ArtifactError


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedCase:
    """One call of the graph."""

    inputs: Mapping[str, NDArray[Any]]
    """Inputs by name, as the graph takes them."""
    outputs: Mapping[str, NDArray[Any]]
    """What the torch graph returned for them, by name."""


def write_cases(cases: Sequence[RecordedCase], path: Path) -> None:
    """Write cases as a compressed npz file with keys such as "0/inputs/image"."""
    arrays = {
        f"{number}/{kind}/{name}": array
        for number, case in enumerate(cases)
        for kind, side in (("inputs", case.inputs), ("outputs", case.outputs))
        for name, array in side.items()
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)


def read_cases(path: Path) -> list[RecordedCase]:
    """Read a file that `write_cases` wrote.

    Raises:
        ArtifactError: the file cannot be read or holds no cases.
    """
    cases: dict[int, tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]] = {}
    try:
        # opened here: numpy leaves a file open that turns out to be a damaged archive
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for key in arrays.files:
                number, kind, name = key.split("/")
                cases.setdefault(int(number), ({}, {}))[("inputs", "outputs").index(kind)][name] = arrays[key]
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ArtifactError(f"recorded cases {path} cannot be read: {error}; compile the policy again") from error
    if not cases:
        raise ArtifactError(f"recorded cases {path}: it holds none; compile the policy again")
    return [RecordedCase(inputs=inputs, outputs=outputs) for _, (inputs, outputs) in sorted(cases.items())]

"""Lower the precision of a chain of graphs, and measure its error against the float32 graph."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evla_compile.artifact.cases import RecordedCase
from evla_compile.artifact.replay import replay
from evla_compile.errors import ExportError, PassError
from evla_compile.exporters.split import Piece
from evla_compile.graph.contract import weights
from evla_compile.graph.inputs import to_tensors
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.inputs import GraphInputs
from evla_compile.passes.lower_precision import LowerPrecision, lowered_sites
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.precision import LOWER_PRECISIONS, Precision


@own_torch_state()
def lower(pieces: Sequence[Piece], precision: Precision, ranges: tuple[tuple[str, float], ...]) -> tuple[Piece, ...]:
    """Return the chain with its matrix products outside the action head in `precision`, all inputs and outputs float32.

    Raises:
        ExportError: `precision` is not float32 and the policy is not, or float16 cannot represent observed values.
    """
    for piece in pieces:
        stored = {str(tensor.dtype).removeprefix("torch.") for _, tensor in weights(piece.graph)}
        if stored & set(LOWER_PRECISIONS):
            raise ExportError(
                f"this policy was loaded in {', '.join(sorted(stored - {'float32', 'int64', 'bool'}))}: load it with"
                f" dtype=torch.float32, which is exact, and export it with precision={min(stored)!r}"
            )
    if precision == "float32":
        return tuple(pieces)
    passes, lowered = (LowerPrecision(dtype=precision, ranges=ranges),), []
    for piece in pieces:
        try:
            graph, _ = run_passes(piece.graph, passes if any(lowered_sites(piece.graph.graph)) else ())
        except PassError as error:
            raise ExportError(str(error)) from error
        lowered.append(replace(piece, graph=graph))
    return tuple(lowered)


def compare(
    pieces: Sequence[Piece], cases: Sequence[RecordedCase], precision: Precision, text_tokens: int
) -> dict[str, float]:
    """Run a lowered chain in torch and return how far each stage is from the recorded ones, at worst; see `replay`.

    Raises:
        VerificationError: a stage leaves the tolerance of `precision`, or overflows it; the message names the first.
    """
    return replay(
        f"this policy in {precision}",
        lambda inputs: run(pieces, inputs),
        cases,
        precision=precision,
        text_tokens=text_tokens,
    )


@own_torch_state()
def run(pieces: Sequence[Piece], inputs: GraphInputs) -> dict[str, NDArray[Any]]:
    """Run a chain in torch: the inputs of a finished graph -> every output of every piece by name."""
    device = next(tensor.device for piece in pieces for _, tensor in weights(piece.graph))
    values: dict[str, Tensor] = dict(zip(COGACT.input_names, to_tensors(inputs, device), strict=True))
    found: dict[str, NDArray[Any]] = {}
    with torch.no_grad():
        for piece in pieces:
            results = piece.graph(*(values[name] for name in piece.inputs))
            results = results if isinstance(results, tuple) else (results,)
            values |= zip(piece.outputs, results, strict=True)
            found |= {name: np.asarray(values[name].cpu()) for name in piece.outputs}
    return found

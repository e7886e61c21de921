"""A compiled policy to an artifact: graph, tokenizer, report, recorded cases and the manifest that binds them."""

import json
import os
from importlib.metadata import version

import numpy as np
import torch

from evla_compile import __version__, host
from evla_compile.artifact import ArtifactFiles, check_space, check_target, writing
from evla_compile.calibration import Frame
from evla_compile.compiled import CompiledPolicy
from evla_compile.errors import ExportError
from evla_compile.exporters.to_onnx import to_onnx
from evla_compile.graph import weights
from evla_compile.manifest import FileRecord, Manifest, TensorSpec, write_manifest
from evla_compile.passes.expose_stages import SAMPLES
from evla_compile.processor import draw_noise
from evla_compile.recorded import RecordedCase, write_cases

ROOM_BYTES = 100_000_000
"""Room that an artifact needs beside its weights: graph, tokenizer, recorded cases."""

_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "numpy")


def export_artifact(
    compiled: CompiledPolicy,
    target: str | os.PathLike[str],
    *,
    opset: int,
    stages: tuple[str, ...],
    progress: bool,
) -> None:
    """Write `compiled` to `target`, an `X.onnx` or a folder; see `CompiledPolicy.export`."""
    files = ArtifactFiles.of(target)
    check_target(target)
    if any(tensor.dtype == torch.bfloat16 for _, tensor in weights(compiled.graph)):
        raise ExportError(
            "this policy has bfloat16 weights, which ONNX Runtime cannot run on a CPU, so that its file could not be"
            " verified: load the policy with dtype=torch.float32 to export it"
        )
    outputs = (SAMPLES, *stages)
    graph = compiled.exposing(outputs) if stages else compiled.graph
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in weights(graph))
    check_space(target, size + ROOM_BYTES)
    with writing(target) as folder:
        model = folder / files.model
        to_onnx(graph, model, outputs=outputs, opset=opset, progress=progress)
        (folder / files.tokenizer).write_text(compiled.processor.tokenizer_json, encoding="utf-8")
        report = json.dumps(compiled.report.to_json(), indent=1)
        (folder / files.report).write_text(report + "\n", encoding="utf-8")
        cases = record_cases(compiled, outputs)
        write_cases(cases, folder / files.cases)
        data = folder / files.data
        manifest = Manifest(
            created_by=__version__,
            model=FileRecord.measure(model),
            data=(FileRecord.measure(data),) if data.exists() else (),
            tokenizer=FileRecord.measure(folder / files.tokenizer),
            report=FileRecord.measure(folder / files.report),
            cases=FileRecord.measure(folder / files.cases),
            inputs=tuple(
                TensorSpec(
                    name=str(node.target),
                    dtype=str(node.meta["val"].dtype).removeprefix("torch."),
                    shape=tuple(node.meta["val"].shape),
                )
                for node in graph.graph.find_nodes(op="placeholder")
            ),
            outputs=tuple(
                TensorSpec(name=name, dtype=str(value.dtype), shape=value.shape)
                for name, value in cases[0].outputs.items()
            ),
            config=compiled.config,
            plan=compiled.plan,
            statistics=compiled.processor.statistics,
            pad_id=compiled.processor.pad_id,
            opset=opset,
            versions={library: version(library) for library in _LIBRARIES},
        )
        write_manifest(manifest, folder / files.manifest)


def record_cases(compiled: CompiledPolicy, outputs: tuple[str, ...]) -> list[RecordedCase]:
    """Run the torch graph on the policy's recorded frames, so that any runtime can be held against it later.

    A policy compiled without calibration frames has none; two frames of seeded noise stand in, which are fit for
    comparing two lowerings of the same graph and for nothing else.
    """
    frames, cases = compiled.frames or _stand_ins(compiled.sizes.image_side), []
    for number, batch in enumerate(host.observations(frames, compiled.config.batch_size)):
        inputs = host.prepare(
            compiled.processor,
            [image for image, _ in batch],
            [instruction for _, instruction in batch],
            text_tokens=compiled.config.text_tokens,
            batch_size=compiled.config.batch_size,
        )
        noise = draw_noise(compiled.noise_shape, number)
        found = compiled.outputs(inputs.image, inputs.input_ids, inputs.text_length, noise, stages=outputs)
        cases.append(
            RecordedCase(
                inputs={
                    "image": inputs.image,
                    "input_ids": inputs.input_ids,
                    "text_length": inputs.text_length,
                    "noise": noise,
                },
                outputs=found,
            )
        )
    return cases


def _stand_ins(side: int) -> tuple[Frame, ...]:
    draw = np.random.Generator(np.random.PCG64(0))
    instructions = ("pick up the object", "open it")
    return tuple(Frame(draw.integers(0, 256, (side, side, 3), dtype=np.uint8), text) for text in instructions)

"""`compile`, and the compiled policy with its export, as users call them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from evla_compile.compiler.pipeline import compile_into
from evla_compile.compiler.result import CompiledGraph, stage_names
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.frames import Frame
from evla_compile.settings.config import OPSET, CompileConfig
from evla_compile.settings.engine_settings import EngineSettings
from evla_compile.settings.plan import Plan
from evla_compile.settings.precision import Precision


class CompiledPolicy(CompiledGraph):
    """A compiled policy, as `compile` returns it: run it in torch, inspect its stages, export it."""

    @own_torch_state()
    def export(
        self,
        path: str | os.PathLike[str],
        *,
        opset: int = OPSET,
        stages: Sequence[str] = (),
        precision: Precision = "float32",
        parts: int = 1,
        engine: EngineSettings | None = None,
        packaging: Literal["exported", "aoti"] = "exported",
        progress: bool = True,
    ) -> None:
        """Write the policy to a file or folder, whole or not at all.

        `evla_compile.runtime.load` reads every kind but a `.pt2`, which is for programs that run torch. Weights are
        read, sliced and cast one at a time, as they are written.

        Args:
            path: one of four kinds: an `X.onnx`, with `X.manifest.json` and so on beside it; an `X.engine`, with its
                ONNX file beside it too; an `X.pt2`, a single file; anything else is a folder.
            opset: ONNX opset, 18 to 23; older consumers may need a lower one than the default. A `.pt2` has none.
            stages: values inside the graph to return as outputs after `samples`; see `ExposeStages`.
            precision: dtype of weights and matrix products of vision, projector and decoder. Below float32, the lowered
                graphs are compared with the float32 one, stage by stage on the recorded frames, before anything is
                written.
            parts: graphs to split the policy into, for builders and devices with little memory: 2 for perception and
                action, more to cut the decoder too.
            engine: for an `X.engine`, how to build it; None for the defaults of `EngineSettings`.
            packaging: for an `X.pt2`, whether to write an ExportedProgram or, for machines like this one, an
                AOTInductor package.
            progress: whether to draw progress bars on standard error.

        Raises:
            ArtifactError: the kind of file is unknown, a file of another origin is in its place, or it cannot be
                written, because the disk is full for instance.
            EvlaError: the library that builds engines is missing or too old, or memory is short.
            ExportError: the graph cannot be lowered, or not to this precision or number of parts.
            PassError: the graph has no such stage.
            ValueError: the opset cannot be written, or a setting is out of range.
            VerificationError: a stage leaves the tolerance of `precision`.
        """
        if Path(path).suffix == ".pt2":
            from evla_compile.exporters.to_pt2 import to_pt2  # noqa: PLC0415

            if parts != 1 or engine is not None:
                raise ValueError("parts= and engine= are not for a .pt2: leave them out")
            to_pt2(self, Path(path), packaging=packaging, stages=stage_names(stages), precision=precision)
            return
        # The exporter takes a second to import.
        from evla_compile.exporters.artifact import ExportSettings, export_artifact  # noqa: PLC0415

        settings = ExportSettings(
            opset=opset, stages=stage_names(stages), precision=precision, parts=parts, engine=engine, progress=progress
        )
        export_artifact(self, path, settings)


def compile(
    policy: CogACT,
    config: CompileConfig | None = None,
    *,
    calibration: Iterable[Frame] | None = None,
    plan: Plan | None = None,
    progress: bool = True,
    scratch: str | os.PathLike[str] | None = None,
) -> CompiledPolicy:
    """Compile a CogACT policy: capture it, rewrite it by `config`, and make all its shapes static.

    `policy` keeps its weights and shares them with the result; it can be compiled again with other settings.

    Args:
        policy: the dense policy, from `load`.
        config: budgets and sampler settings; None for `CompileConfig()`, the budgets of the paper's headline row with
            repair. The result's `config` has counts in place of shares.
        calibration: real observations, (image, instruction) pairs, to measure layers, neurons and the ranges that
            float16 needs on. The report then also says how far the compiled policy is from the dense one on the first
            of them.
        plan: the result of an earlier `calibrate` of the same weights for the same budgets, instead of measuring again.
        progress: whether to draw a progress bar of the calibration on standard error.
        scratch: folder from which an interrupted calibration goes on; see `calibrate`.

    Raises:
        CheckpointError: a weight has values that are not finite; every weight is read once to know.
        CalibrationError: a budget needs measuring and neither `calibration` nor `plan` is given, the plan does not fit,
            or there are no frames.
        ValueError: a budget does not fit the policy, or a frame is refused.
        PassError: the captured graph lacks a site that a rewrite needs.
    """
    return compile_into(
        CompiledPolicy, policy, config, calibration=calibration, plan=plan, progress=progress, scratch=scratch
    )

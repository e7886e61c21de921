"""Runs a checkpoint of any size through the compiler, one process for each stage, and measures time and peak memory.

Budgets are the paper's headline row. No layer or neuron is measured: the first ones stay, which changes neither time
nor memory, and makes the actions meaningless.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch

import evla_compile as evla
from evla_compile.artifact.cases import read_cases
from evla_compile.compiled_policy import CompiledPolicy, compile
from evla_compile.demo.demo import describe_machine
from evla_compile.demo.shipped_policy import demo_frame
from evla_compile.estimate.estimates import skeleton
from evla_compile.exporters.onnx_weights import without_data
from evla_compile.exporters.to_onnx import to_model
from evla_compile.families.cogact.loading.checkpoint import read_checkpoint
from evla_compile.memory import watching_memory
from evla_compile.settings.config import PAPER_TEXT_TOKENS
from evla_compile.settings.plan import stand_in_plan
from evla_compile.settings.sizes import published_sizes
from evla_compile.settings.tolerances import TOLERANCES, check
from evla_compile.verification.verify import prove_static_shapes_of

CONFIG = replace(evla.CompileConfig.preset("l22-t56"), text_tokens=PAPER_TEXT_TOKENS)
"""EfficientVLA with L=22, T=56, N=5, and the longest of SIMPLER's prompts."""

Result: TypeAlias = dict[str, Any]
"""Measurements of a stage, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to run, and on which files."""

    run: Path
    """The run directory."""
    tokenizer: Path | None
    """Llama-2's tokenizer.json, for a run directory without one."""
    out: Path
    """Folder for artifacts."""
    threads: int
    """Threads of torch and of ONNX Runtime."""


def compile_without_weights(job: Job) -> Result:
    """Capture, plan given, rewrites, ONNX graph and the proof of static shapes, of CogACT-Base on the meta device."""
    del job
    times: Result = {}
    policy = skeleton(published_sizes("base"), dtype=torch.float32)
    start = perf_counter()
    compiled = _compile(policy)
    times["capture and passes, s"] = perf_counter() - start
    start = perf_counter()
    model = to_model(compiled.graph, outputs=["samples"])
    times["ONNX graph, s"] = perf_counter() - start
    start = perf_counter()
    times["operators"] = prove_static_shapes_of(without_data(model), "the ONNX graph")
    times["proof of static shapes, s"] = perf_counter() - start
    return times


def load(job: Job) -> Result:
    """Load the policy in the dtype that it is stored in, and read every weight once."""
    times: Result = {}
    stored = read_checkpoint(job.run).tensors["projector.projector.0.weight"].dtype
    policy = _timed(times, "load, s", lambda: evla.load(job.run, tokenizer=job.tokenizer, dtype=stored))
    _timed(times, "read every weight, s", lambda: [parameter.sum().item() for parameter in policy.parameters()])
    return {**times, "weights, GB": sum(parameter.nbytes for parameter in policy.parameters()) / 1e9}


def one_action_bfloat16(job: Job) -> Result:
    """Predict one action chunk with the compiled graph, VLM in bfloat16, action head in float32, by torch."""
    times: Result = {}
    start = perf_counter()
    policy = evla.load(job.run, tokenizer=job.tokenizer, dtype=torch.bfloat16)
    times["load, s"] = perf_counter() - start
    compiled = _timed(times, "compile, s", lambda: _compile(policy))
    weights = compiled.report.passes[-1].after.weight_bytes
    dataset = min(policy.processor.statistics)
    actions = _timed(times, "one action, s", lambda: compiled.predict_action(*demo_frame(), dataset))
    if actions.shape != (16, 7) or not np.isfinite(actions).all():
        raise RuntimeError(f"actions of shape {actions.shape}, expected [16, 7] of finite numbers")
    return {**times, "weights, GB": weights / 1e9}


def export(job: Job, *, dense: bool) -> Result:
    """Export in float32, slicing and casting weights as they are written; time the graph without weights as well."""
    times: Result = {}
    policy = evla.load(job.run, tokenizer=job.tokenizer, deferred=True)
    config = evla.CompileConfig.dense(text_tokens=PAPER_TEXT_TOKENS) if dense else CONFIG
    compiled = _timed(times, "compile, s", lambda: _compile(policy, config))
    _timed(times, "ONNX graph, s", lambda: to_model(compiled.graph, outputs=["samples"]))
    _timed(times, "export in all, s", lambda: compiled.export(_artifact(job, dense=dense)))
    data = _artifact(job, dense=dense) / "model.onnx.data"
    return {**times, "data file, GB": data.stat().st_size / 1e9}


def run_onnx(job: Job, *, dense: bool) -> Result:
    """Load the exported policy into ONNX Runtime with its weights mapped, and run it twice against the torch graph."""
    times: Result = {}
    folder = _artifact(job, dense=dense)
    policy = _timed(
        times, "load, s", lambda: evla.runtime.load(folder, threads=job.threads, check_hashes=False, mapped=True)
    )
    case = read_cases(folder / "cases.npz", policy.manifest)[0]
    for call in ("first", "second"):
        samples = _timed(times, f"{call} call, s", lambda: policy.sample(*case.inputs.arrays))
    error = check("samples", samples, case.outputs["samples"], tolerance=TOLERANCES.lowered)
    return {**times, "relative error to the torch graph": error}


STAGES: Mapping[str, Callable[[Job], Result]] = {
    "compile without weights": compile_without_weights,
    "load, as stored": load,
    "one action, bfloat16, torch": one_action_bfloat16,
    "export compiled, float32": partial(export, dense=False),
    "run compiled in ONNX Runtime, mapped": partial(run_onnx, dense=False),
    "export dense, float32": partial(export, dense=True),
    "run dense in ONNX Runtime, mapped": partial(run_onnx, dense=True),
}
"""The stages in order; a run needs the export before it."""


def main() -> None:
    """Run the stages asked for, print their measurements, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run directory of the checkpoint")
    parser.add_argument("--tokenizer", type=Path, help="Llama-2's tokenizer.json, or its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for artifacts; they are deleted at the end")
    parser.add_argument(
        "--label", default="", help="note on the checkpoint, such as its dtype, shown after the stage's name"
    )
    parser.add_argument("--results", type=Path, help="folder of full-size.json, in which the stages run are replaced")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch and of ONNX Runtime"
    )
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="stages to run")
    arguments = parser.parse_args()
    job = Job(run=arguments.run, tokenizer=arguments.tokenizer, out=arguments.out, threads=arguments.threads)
    job.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    machine = describe_machine(job.threads)
    for name in arguments.stages:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # so that peaks do not mix
            found = process.submit(_measured, name, job).result()
        label = f"{name}, {arguments.label}" if arguments.label else name
        results[label] = {"machine": machine, "date": datetime.now(UTC).date().isoformat(), "measured": found}
        print(label, *(f"  {key}: {value:.4g}" for key, value in found.items()), sep="\n", flush=True)
        if name.startswith("run "):
            shutil.rmtree(_artifact(job, dense="dense" in name))
        if arguments.results is not None:
            _write(arguments.results, results)


def _measured(name: str, job: Job) -> Result:
    torch.set_num_threads(job.threads)
    with watching_memory() as peak:
        found = STAGES[name](job)
    return {**found, "peak memory, GB": peak.private / 1e9, "with mapped files, GB": peak.resident / 1e9}


def _compile(policy: Any, config: evla.CompileConfig = CONFIG) -> CompiledPolicy:
    return compile(policy, config, plan=stand_in_plan(policy.sizes, config))


def _timed(times: Result, name: str, work: Callable[[], Any]) -> Any:
    start = perf_counter()
    result = work()
    times[name] = perf_counter() - start
    return result


def _artifact(job: Job, *, dense: bool) -> Path:
    return job.out / ("dense" if dense else "compiled")


def _write(folder: Path, results: Mapping[str, Result]) -> None:
    """Add the stages to the file, each with its own machine and date."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "full-size.json"
    before = json.loads(file.read_text(encoding="utf-8"))["stages"] if file.exists() else {}
    contents = {"config": CONFIG.to_json(), "stages": {**before, **results}}
    file.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

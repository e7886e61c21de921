"""The command line, `evla`: each command is a few calls of the public interface, and prints what they return."""

# ruff: noqa: PLC0415 - torch takes seconds to import, so a command imports what it needs; `evla run` needs none of it.

import json
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

import evla_compile as evla
from evla_compile.cli_settings import read_config, read_plan
from evla_compile.config import OPSET, PAPER_TEXT_TOKENS, LayerRule, Precision
from evla_compile.engine_settings import EngineSettings, Flavour
from evla_compile.errors import EvlaError
from evla_compile.memory import PeakMemory, watching_memory
from evla_compile.runtime import Provider

if TYPE_CHECKING:
    from evla_compile.doctor_request import Finding

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile CogACT robot policies by EfficientVLA's rewrites, and run them without torch.",
)

RunDirectory = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="CogACT run directory, its .pt file, or a Hugging Face id.")
]
Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a compiled policy, or its .onnx file.")]


def main() -> None:
    """Run the command line; what a user can mend ends in one message and exit status 2, without a traceback."""
    try:
        app(prog_name="evla")
    except (EvlaError, ValueError, OSError) as error:
        # Long words, paths among them, stay whole: they are there to be copied.
        _console(stderr=True).print(f"error: {error}", overflow="ignore", crop=False)
        sys.exit(2)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="New folder to keep everything in.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls of each backend.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each backend.")] = 1,
) -> None:
    """Take the small policy that the package carries through the whole path, and time it. Needs no network."""
    from evla_compile.tables import demo_summary

    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise ValueError(f"--out {out}: expected a folder that does not exist yet, in one that does; choose another")
    with TemporaryDirectory(dir=None if out is None else out.parent) as scratch:
        # A folder inside, since a temporary one is closed to other users and would stay so.
        folder = Path(scratch) / "demo"
        folder.mkdir()
        with _step("import torch and transformers"):
            from evla_compile.demo import PICTURE, run_demo
            from evla_compile.demo_policy import DEMO_IMAGE
        result = run_demo(folder, runs=runs, threads=threads, step=_step)
        if out is not None:
            folder.rename(out)
    _console().print(demo_summary(result))
    if out is not None:
        _console().print(f"the same on the frame: {out / PICTURE}")
        _print_next(out / "compiled", (), image=DEMO_IMAGE, instruction=result.instruction)


@app.command("compile")
def compile_policy(
    ctx: typer.Context,
    run_dir: RunDirectory,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the artifact, or an X.onnx.")],
    calibration: Annotated[
        Path | None, typer.Option(metavar="FRAMES", help="Folder of real observations, listed in its frames.jsonl.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="Plan file, or DIR of a compiled policy: do not measure again.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"Start from {', '.join(sorted(evla.PRESETS))}.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Start from keeping everything.")] = False,
    keep_layers: Annotated[str | None, typer.Option(metavar="N|i,j,k|all", help="Decoder layers kept.")] = None,
    layer_rule: Annotated[
        LayerRule | None, typer.Option(help="Which layers go: the paper's importance, or one after the other.")
    ] = None,
    mlp_keep: Annotated[float | None, typer.Option(help="Share of each kept MLP's neurons kept.")] = None,
    visual_tokens: Annotated[str | None, typer.Option(metavar="N|all", help="Visual tokens kept.")] = None,
    key_tokens: Annotated[int | None, typer.Option(help="Of these, always kept by relevance.")] = None,
    task_share: Annotated[float | None, typer.Option(help="Share of the others kept by relevance.")] = None,
    cache_interval: Annotated[int | None, typer.Option(help="Denoising steps from one recomputation to the next.")] = (
        None
    ),
    ddim_steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 for none.")] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Text budget in tokens.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Static batch size.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Llama-2's tokenizer.json, or its folder.")] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of weights and matrix products outside the action head.")
    ] = "float32",
    parts: Annotated[int, typer.Option(min=1, help="Graphs to split it into: 2 are perception and action.")] = 1,
    opset: Annotated[int, typer.Option(help="ONNX opset.")] = OPSET,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Verify the artifact at the end.")] = True,
) -> None:
    """Compile a policy to an artifact: by the paper's headline row, unless options say otherwise."""
    from evla_compile.artifact import check_target
    from evla_compile.tables import compile_summary

    config = read_config(ctx.params, preset=preset, dense=dense)
    check_target(out)
    with _step("import torch and transformers"):
        from evla_compile.checkpoint import read_checkpoint
        from evla_compile.exporters.to_onnx import OPSETS
        from evla_compile.pipeline import check_budgets, check_plan
        from evla_compile.plan import needs_calibration, plan_without_calibration
    if opset not in OPSETS:
        raise ValueError(f"--opset {opset}: expected one from {OPSETS.start} to {OPSETS.stop - 1}")
    frames = None if calibration is None else evla.read_frames(calibration)
    chosen = None if plan is None else read_plan(plan)
    # Loading casts gigabytes of weights, so what their shapes can refuse is refused before.
    sizes = read_checkpoint(run_dir).sizes
    check_budgets(config, sizes)
    if chosen is not None:
        check_plan(chosen, config, sizes)
    elif frames is None or not (needs_calibration(sizes.language, config) or precision == "float16"):
        chosen = plan_without_calibration(sizes.language, config)
    with watching_memory() as peak:
        with _step("load the policy"):
            policy = evla.load(run_dir, tokenizer=tokenizer, deferred=True)
        for frame in frames or ():
            policy.processor.text(frame.instruction, config.text_tokens)
        if chosen is None and frames is not None:
            chosen = evla.calibrate(policy, frames, config)
        with _step("capture and rewrite the graph"):
            compiled = evla.compile(policy, config, calibration=frames, plan=chosen, progress=False)
        with _step(f"export it to {out}", spinner=False):  # it draws a bar of its own
            compiled.export(out, opset=opset, precision=precision, parts=parts)
    _print_memory(peak)
    if check:
        with _step("verify it on ONNX Runtime"):
            evla.verify(out, provider="cpu")
    _console().print(compile_summary(compiled.report))
    _print_next(out, policy.processor.statistics)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A RUN_DIR, or the DIR of a compiled policy.")],
) -> None:
    """Show what a checkpoint or a compiled policy holds, without reading its weights."""
    console = _console()
    place = Path(path)
    if place.suffix in (".onnx", ".json") or (place / "manifest.json").is_file():
        from evla_compile.artifact import find_manifest
        from evla_compile.manifest import read_manifest
        from evla_compile.tables import manifest_table

        console.print(manifest_table(read_manifest(find_manifest(place))))
        return
    from evla_compile.tables import checkpoint_summary, estimate_summary

    with _step("import torch and transformers"):
        import torch

        from evla_compile.comparison import compare, configurations, read_sound_checkpoint
    checkpoint = read_sound_checkpoint(path)
    configs = configurations([], dense=True, text_tokens=PAPER_TEXT_TOKENS)
    found = compare(checkpoint.sizes, configs, dtype=torch.bfloat16, step=_step)
    console.print(checkpoint_summary(checkpoint))
    console.print(estimate_summary(found, text_tokens=PAPER_TEXT_TOKENS))


@app.command()
def estimate(
    size: Annotated[str, typer.Argument(metavar="SIZE", help="small, base or large (or S, B, L), or a RUN_DIR.")],
    preset: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(sorted(evla.PRESETS))}, or all; may be repeated.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="The policy with exact rewrites alone.")] = False,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Of vision and language; the action head is float32.")
    ] = "bfloat16",
    text_tokens: Annotated[int, typer.Option(help="Text budget in tokens.")] = PAPER_TEXT_TOKENS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Weigh budgets before downloading any weight: size, operations and roofline of a policy and of its presets.

    Without --preset and --dense it shows all of them. Upstream's way of running the policy is always the first row.
    """
    from evla_compile.tables import estimate_summary

    with _step("import torch and transformers"):
        import torch

        from evla_compile.comparison import compare, configurations, sizes_of
    configs = configurations(preset or [], dense=dense, text_tokens=text_tokens)
    found = compare(sizes_of(size), configs, dtype=getattr(torch, dtype), step=_step)
    if as_json:
        print(json.dumps({name: estimated.to_json() for name, estimated in found.items()}))
    else:
        _console().print(estimate_summary(found, text_tokens=text_tokens))


@app.command()
def run(
    artifact: Artifact,
    image: Annotated[Path, typer.Option(metavar="FILE", help="Camera frame, 8-bit RGB.")],
    instruction: Annotated[str, typer.Option(help="What the robot shall do.")],
    unnorm_key: Annotated[str | None, typer.Option(help="Dataset whose statistics scale the actions.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler's noise.")] = None,
    provider: Annotated[
        Provider | None, typer.Option(help="Where to compute; engine for an .engine file, else cpu by default.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Calls, timed; more than one prints their latency.")] = 1,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Launch an engine's calls as a CUDA graph.")] = (
        False
    ),
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep engines or kernels that are built at load time.")
    ] = None,
    mapped: Annotated[bool, typer.Option("--mapped", help="Leave the weights in their file: slower, less memory.")] = (
        False
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the action chunk for a camera frame on ONNX Runtime or TensorRT; imports no torch."""
    from evla_compile.host import read_image
    from evla_compile.tables import ACTION_NAMES, action_table, call_table

    frame = read_image(image)
    policy = evla.runtime.load(artifact, provider, mapped=mapped, cuda_graph=cuda_graph, cache=cache)
    for _ in range(repeat):
        actions = policy.predict_action(frame, instruction, unnorm_key, seed=seed)
    latency = policy.latency.summary() if repeat > 1 else ()
    if as_json:
        found = {"names": ACTION_NAMES, "actions": actions.tolist()}
        print(json.dumps(found | ({"latency": [asdict(summary) for summary in latency]} if latency else {})))
        return
    _console().print(action_table(actions, f'Actions for "{instruction}"'))
    if latency:
        _console().print(call_table(latency))


@app.command()
def build(
    artifact: Artifact,
    flavour: Annotated[
        Flavour | None, typer.Option(help="TensorRT on the GPU that will run it, or TensorRT-RTX ahead of time.")
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option(metavar="X.Y", help="GPU to build for, such as 8.9; repeat for several. TensorRT-RTX only."),
    ] = None,
    workspace_gb: Annotated[float | None, typer.Option(help="Most GPU memory for one layer's intermediates.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Most memory for the builder; else what is free.")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="0 to 5: how long to look. TensorRT only.")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep what was measured for the next build. TensorRT only.")
    ] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="For every GPU from 8.0 on. TensorRT only, no Jetson.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="For later TensorRT too. TensorRT only.")
    ] = False,
) -> None:
    """Build the TensorRT engines of a compiled policy beside its ONNX files; imports no torch."""
    from evla_compile.exporters.build import build_engine
    from evla_compile.tables import describe_engine

    settings = EngineSettings(
        flavour=flavour,
        compute_capabilities=tuple(capability or ()),
        workspace_bytes=None if workspace_gb is None else round(workspace_gb * 1e9),
        memory_bytes=None if memory_gb is None else round(memory_gb * 1e9),
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
    )
    with _step("build the engine", spinner=False):  # it draws bars of its own
        engine = build_engine(artifact, settings).engine
    if engine is not None:
        files = ", ".join(f"{record.name} ({record.size / 1e6:,.1f} MB)" for record in engine.files)
        _console().print(f"built {files}: {describe_engine(engine)}")


@app.command()
def verify(
    artifact: Artifact,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime.")] = None,
    provider: Annotated[
        Provider | None, typer.Option(help="Where the runtime computes; engine for the TensorRT engine.")
    ] = None,
    stages: Annotated[bool, typer.Option("--stages", help="Show every stage.")] = False,
) -> None:
    """Prove that an artifact is intact and static, and that every stage is what its float32 torch graph returned."""
    from evla_compile.tables import stage_table

    with _step("verify on ONNX Runtime" if provider in (None, "cpu") else f"verify on {provider}"):
        found = evla.verify(artifact, threads=threads, provider=provider)
    if stages:
        _console().print(stage_table(found))
    errors = ", ".join(f"{name} {error:.1e}" for name, error in found.errors)
    _console().print(
        f"verified: files as the manifest says; {found.nodes} operators, all shapes static; {found.cases} recorded"
        f" cases, {len(found.stages)} stages each, largest relative error {errors} (tolerance {found.tolerance:.0e})"
    )


@app.command()
def doctor(
    work: Annotated[
        Literal["compile", "run", "build"] | None, typer.Argument(help="What is going to be done on this machine.")
    ] = None,
    artifact: Annotated[Path | None, typer.Option(metavar="DIR", help="The compiled policy that it is about.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Without an artifact: small, base, large or a RUN_DIR. Needs torch.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"Of that size: {', '.join(sorted(evla.PRESETS))}, dense.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of that size's export; float32 by default.")] = None,
    provider: Annotated[Provider | None, typer.Option(help="For run: where to compute.")] = None,
    flavour: Annotated[Flavour | None, typer.Option(help="For build and to run an engine: the library.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check whether this machine can do a piece of work, and say what to do about what it lacks.

    Exit status 0: it can. 1: it cannot. 2: the question was wrong. Without a piece of work it shows everything that is
    here and what can be done with it, and 1 says that something installed is broken.
    """
    from evla_compile.doctor import examine, stored_bytes
    from evla_compile.doctor_request import make_request
    from evla_compile.tables import findings_table

    if work is None:
        if any(given is not None for given in (artifact, size, preset, precision, provider, flavour)):
            raise ValueError("expected compile, run or build in front of these options: evla doctor run --artifact DIR")
        _survey(as_json=as_json)
        return
    if size is None and (preset is not None or precision is not None):
        raise ValueError("--preset and --precision describe --size: give it too, or leave them out")
    weight_bytes = None if size is None else stored_bytes(size, preset, precision or "float32")
    request = make_request(work, provider=provider, flavour=flavour, artifact=artifact, weight_bytes=weight_bytes)
    with _step("look at this machine"):
        found = examine(request)
    failed = [finding.check for finding in found if finding.status == "failed"]
    if as_json:
        print(json.dumps({"can": not failed, "findings": [finding.to_json() for finding in found]}))
    else:
        _console().print(findings_table(found))
        _print_remedies(found)
        what = request.describe()
        _console().print(f"cannot {what}: see {', '.join(failed)}" if failed else f"can {what}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _survey(*, as_json: bool) -> None:
    """Print what is on this machine and what can be done with it."""
    from evla_compile.doctor import survey_machine
    from evla_compile.tables import findings_table, works_table

    with _step("look at this machine"):
        found = survey_machine()
    broken = [finding for finding in found.findings if finding.status == "failed"]
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        _console().print(findings_table(found.findings), works_table(found))
        _print_remedies(broken)
        _console().print(
            f"broken: {', '.join(finding.check for finding in broken)}" if broken else "nothing that is here is broken"
        )
    if broken:
        raise typer.Exit(1)


def _print_remedies(findings: Iterable["Finding"]) -> None:
    from evla_compile.tables import remedies

    lines = remedies(findings)
    if lines:
        _console().print("What to do:", *(f"  {line}" for line in lines), "", sep="\n", soft_wrap=True)


@contextmanager
def _step(what: str, *, spinner: bool = True) -> Iterator[None]:
    """Show on standard error what is being done, and after it how long it took."""
    console, start = _console(stderr=True), perf_counter()
    with console.status(Text(what)) if spinner else nullcontext():
        yield
    console.print(f"{perf_counter() - start:6.1f} s  {what}", style="dim", soft_wrap=True)


def _print_memory(peak: PeakMemory) -> None:
    if peak.private:
        _console(stderr=True).print(
            f"peak memory {peak.private / 1e9:.2f} GB, and {peak.resident / 1e9:.2f} GB together with the files mapped",
            style="dim",
            soft_wrap=True,
        )


def _print_next(
    artifact: Path,
    datasets: Collection[str],
    *,
    image: Path | str = "FRAME.png",
    instruction: str = "pick up the apple",
) -> None:
    key = f" --unnorm-key {shlex.quote(min(datasets))}" if len(datasets) > 1 else ""
    folder, picture, words = (shlex.quote(str(said)) for said in (artifact, image, instruction))
    _console().print(
        f"\nWritten to {artifact}. Next:\n  evla verify {folder}\n"
        f"  evla run {folder} --image {picture} --instruction {words}{key}",
        soft_wrap=True,
    )


def _console(*, stderr: bool = False) -> Console:
    """Return a console that prints what it is given: brackets in messages and instructions are no markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)

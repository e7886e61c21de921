"""The variants that can be evaluated: recipes by name, and run directories, artifacts and ONNX files by path."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import fx

from benchmarks.closed_loop.evaluation.layer_rules import OTHER_RULES, kept_by_rule
from benchmarks.closed_loop.evaluation.recipes import RECIPES, Recipe, frontier_recipe
from evla_compile import runtime
from evla_compile.calibration.calibrate import calibrate
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.compiler.pipeline import build_passes
from evla_compile.compiler.report import CompileReport
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import GraphPass, Value
from evla_compile.graph.patch_scores import ScoringSite
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.sites import input_node
from evla_compile.host.frames import Frame
from evla_compile.passes import SelectTokens
from evla_compile.settings.anatomy import NOISE
from evla_compile.settings.plan import Plan, plan_without_calibration

Backend: TypeAlias = Literal["onnx", "torch"]
"""ONNX Runtime on the CPU, or the same graph in torch."""
BACKENDS: tuple[Backend, ...] = get_args(Backend)

aten = torch.ops.aten


class Policy(Protocol):
    """Frame and instruction in, action chunk out."""

    def predict_action(
        self,
        image: Image.Image | NDArray[np.uint8],
        instruction: str,
        unnorm_key: str | None = None,
        noise: NDArray[np.floating] | None = None,
        seed: int | None = None,
    ) -> NDArray[np.float64]:
        """Return the action chunk [A,7]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One thing to evaluate."""

    name: str
    """Its name in tables: "dense", "efficientvla@torch", "mine"."""
    backend: Backend
    """What runs it."""
    recipe: Recipe | None = None
    """Its recipe; None for a path."""
    path: Path | None = None
    """A run directory, an artifact or an ONNX file; None for a recipe."""

    @property
    def noise(self) -> int:
        """Which set of initial noises its episodes use."""
        return 0 if self.recipe is None else self.recipe.noise


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomTokens(SelectTokens):
    """A control for SelectTokens: as many visual tokens, drawn at random in every call, lossy.

    The draw is the order of the first numbers of the noise that the sampler starts from, so it is random over frames
    and the same on every backend.
    """

    patches: int
    """Visual tokens to draw from."""

    def _choose(self, gm: fx.GraphModule, site: ScoringSite, similar: Value | None) -> Value:
        noise = input_node(gm.graph, NOISE)
        batch, chunk, actions = noise.meta["val"].shape
        draw = aten.reshape.default(site.proxy(noise), [batch, chunk * actions])
        ranking = aten.sort.stable(aten.slice.Tensor(draw, 1, 0, self.patches), stable=True, dim=1)[1]
        kept = aten.slice.Tensor(ranking, 1, 0, self.visual_tokens)
        return aten.sort.default(kept, 1)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A variant that workers can open."""

    variant: Variant
    """The variant."""
    policy: Path
    """Run directory of the policy that the recipe is applied to."""
    artifact: Path | None
    """Artifact for `evla_compile.runtime.load`; None where torch runs it."""
    plan: Path | None
    """The plan of a recipe; None for a path."""
    config: dict[str, Any]
    """Compile settings, as JSON-ready values."""
    flops: int | None
    """Floating-point operations of one call; None where it is unknown."""

    def open(self, threads: int) -> Policy:
        """Load the policy, ready to run."""
        if self.artifact is not None:
            return runtime.load(self.artifact, threads=threads)
        torch.set_num_threads(threads)
        policy, recipe = load(self.policy), self.variant.recipe
        return policy if recipe is None or self.plan is None else _compile(policy, recipe, Plan.load(self.plan))


def parse_variant(text: str) -> Variant:
    """Return the variant that a user names: NAME, NAME@BACKEND, or NAME=PATH and NAME=PATH@BACKEND.

    Raises:
        ValueError: the name is unknown, the path does not exist, or the backend does not run it.
    """
    before, _, backend = text.partition("@")
    name, _, path = before.partition("=")
    if backend not in ("", *BACKENDS):
        raise ValueError(f"--variant {text}: expected one of {', '.join(BACKENDS)} behind the @")
    if not path:
        recipe = RECIPES.get(name) or frontier_recipe(name)
        if recipe is None:
            raise ValueError(
                f"--variant {text}: expected NAME=PATH, budgets such as l6-m50-t8-n5, or one of {', '.join(RECIPES)}"
            )
        return Variant(name=text, backend=_backend(backend or "onnx"), recipe=recipe)
    file = Path(path)
    if not file.exists():
        raise ValueError(f"--variant {text}: {file} does not exist")
    is_run = (file / "checkpoints").is_dir()
    chosen = _backend(backend or ("torch" if is_run else "onnx"))
    if (chosen == "torch") != is_run:
        raise ValueError(f"--variant {text}: torch runs run directories, ONNX Runtime runs artifacts and ONNX files")
    label = f"{name}@{backend}" if backend else name
    return Variant(name=label, backend=chosen, path=file)


def prepare(variant: Variant, policy: CogACT, source: Path, frames: Sequence[Frame], folder: Path) -> Prepared:
    """Compile and export a variant, unless the folder contains it already.

    Args:
        variant: the variant.
        policy: the policy that recipes are applied to.
        source: its run directory.
        frames: calibration frames.
        folder: folder of the variants; created if needed.

    Raises:
        EvlaError: it cannot be compiled or exported.
    """
    if variant.path is not None:
        is_run = variant.backend == "torch"
        config = {} if is_run else runtime.load(variant.path, threads=1).config.to_json()
        return Prepared(
            variant=variant,
            policy=variant.path if is_run else source,
            artifact=None if is_run else variant.path,
            plan=None,
            config=config,
            flops=None,
        )
    if variant.recipe is None:
        raise ValueError(f"variant {variant.name}: expected a recipe or a path")
    folder.mkdir(parents=True, exist_ok=True)
    notes, artifact, plan_file = folder / "variant.json", folder / "artifact", folder / "plan.json"
    if not notes.exists():
        plan = make_plan(policy, variant.recipe, frames)
        compiled = _compile(policy, variant.recipe, plan, frames)
        plan.save(plan_file)
        if variant.backend == "onnx":
            compiled.export(artifact, progress=False)
        flops = compiled.report.passes[-1].after.flops
        written = {"config": compiled.config.to_json(), "flops": flops, "keep_layers": list(plan.keep_layers)}
        notes.write_text(json.dumps(written), encoding="utf-8")
    written = json.loads(notes.read_text(encoding="utf-8"))
    return Prepared(
        variant=variant,
        policy=source,
        artifact=artifact if variant.backend == "onnx" else None,
        plan=plan_file,
        config=written["config"] | {"keep_layers": written["keep_layers"]},
        flops=written["flops"],
    )


def make_plan(policy: CogACT, recipe: Recipe, frames: Sequence[Frame]) -> Plan:
    """Measure the policy on the frames and return the plan of a recipe, its layer rule applied.

    Raises:
        EvlaError: the policy cannot be measured.
    """
    config = recipe.config(policy.sizes)
    if not config.unmeasured(policy.sizes):
        return plan_without_calibration(policy.sizes, config)
    other = next((rule for rule in OTHER_RULES if rule == recipe.layer_rule), None)
    if other is not None and isinstance(config.keep_layers, int):
        keep = kept_by_rule(policy, frames, other, config.keep_layers, seed=recipe.layer_seed)
        config = replace(config, keep_layers=keep)
    return calibrate(policy, recipe.calibration(frames), config, progress=False)


def _compile(policy: CogACT, recipe: Recipe, plan: Plan, frames: Sequence[Frame] = ()) -> CompiledPolicy:
    """Compile as `evla_compile.compile` does, with the control in place of the selection if the recipe has it."""
    config = replace(recipe.config(policy.sizes), keep_layers=plan.keep_layers)
    passes = build_passes(config, plan, policy.sizes)
    controlled = [_controlled(rewrite, recipe, policy.sizes.patches) for rewrite in passes]
    graph, reports = run_passes(capture(policy, config), controlled)
    return CompiledPolicy(
        graph=graph,
        config=config,
        plan=plan,
        sizes=policy.sizes,
        processor=policy.processor,
        report=CompileReport(config=config, passes=reports, deviations=()),
        frames=tuple(frames)[:2],
    )


def _controlled(rewrite: GraphPass, recipe: Recipe, patches: int) -> GraphPass:
    if not recipe.random_tokens or not isinstance(rewrite, SelectTokens):
        return rewrite
    return RandomTokens(
        visual_tokens=rewrite.visual_tokens,
        key_tokens=rewrite.key_tokens,
        task_share=rewrite.task_share,
        merge_tokens=rewrite.merge_tokens,
        patches=patches,
    )


def _backend(name: str) -> Backend:
    return next(backend for backend in BACKENDS if backend == name)

"""Recipes: named settings of a compilation, in shares of what a policy has; the ablation and the frontier."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.closed_loop.evaluation.layer_rules import OtherRule
from benchmarks.closed_loop.simulation.tasks import TASKS
from evla_compile.host.frames import Frame
from evla_compile.settings.budgets.layers import LAYER_RULES, LayerRule
from evla_compile.settings.budgets.repair import REPAIR_SCOPES, RepairScope
from evla_compile.settings.budgets.tokens import TokenRule
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Settings of a named variant of a policy; counts are shares of what the policy has."""

    layers: float | tuple[int, ...] = 1.0
    """Decoder layers kept, or which ones."""
    layer_rule: LayerRule | OtherRule = "importance"
    """Which layers go: by a rule of `CompileConfig`, or of layer_rules.py."""
    layer_seed: int = 0
    """Seed of "random"."""
    mlp_keep: float = 1.0
    """MLP neurons kept in each layer."""
    tokens: float = 1.0
    """Visual tokens kept."""
    random_tokens: bool = False
    """A control: random tokens, drawn in every call."""
    token_rule: TokenRule = "relevance"
    """Which visual tokens stay."""
    merge: bool = False
    """Whether visual tokens that go are averaged into those that stay."""
    vision_mlp_keep: float = 1.0
    """MLP neurons kept in each block of the vision towers."""
    repair: RepairScope = "none"
    """Which kept layers are refit, at most."""
    frames: int | None = None
    """Calibration frames of each instruction, the first ones; None for all."""
    without: str | None = None
    """A task whose calibration frames are left out."""
    cache_interval: int = 1
    """Denoising steps between two recomputations of the action head."""
    cache_steps: int | None = None
    """Denoising steps that compute, chosen by calibration, what is reused extrapolated; None for the interval."""
    ddim_steps: int = 10
    """Denoising steps of DDIM."""
    solver_steps: int | None = None
    """Steps of DPM-Solver++ in its place, its timesteps chosen by calibration; None for DDIM."""
    text_tokens: int = 32
    """Text budget; the longest instruction that the policy was trained with has 18."""
    noise: int = 0
    """Which set of initial noises the episodes use; all variants but those that measure its effect share set 0."""

    def __str__(self) -> str:
        parts = (*self._perception(), *self._sampling())
        return ", ".join(parts) or "everything kept"

    def _perception(self) -> Iterator[str]:
        """Yield what is done to the decoder and the visual tokens."""
        if isinstance(self.layers, tuple):
            yield f"layers {', '.join(map(str, self.layers))}"
        elif self.layers < 1:
            rule = f"{self.layer_rule}, draw {self.layer_seed}" if self.layer_rule == "random" else self.layer_rule
            yield f"{self.layers:.0%} of the decoder layers ({rule})"
        if self.mlp_keep < 1:
            yield f"{self.mlp_keep:.0%} of the MLP neurons"
        if self.tokens < 1:
            drawn = " (random in every call)" if self.random_tokens else ""
            rule = "" if self.token_rule == "relevance" else f" ({self.token_rule})"
            yield f"{self.tokens:.0%} of the visual tokens{drawn or rule}{', merged' if self.merge else ''}"
        if self.vision_mlp_keep < 1:
            yield f"{self.vision_mlp_keep:.0%} of the vision towers' neurons"
        if self.repair != "none":
            yield f"repair of {self.repair}"
        if self.frames is not None:
            yield f"{self.frames} calibration frames a task"
        if self.without is not None:
            yield f"calibrated without {self.without}"

    def _sampling(self) -> Iterator[str]:
        """Yield what is done to the sampler, and the settings of a call."""
        if self.cache_interval > 1:
            yield f"cache N={self.cache_interval}"
        if self.cache_steps is not None:
            yield f"cache with {self.cache_steps} chosen steps, extrapolated"
        if self.solver_steps is not None:
            yield f"DPM-Solver++ with {self.solver_steps} chosen timesteps"
        if self.ddim_steps != CompileConfig.dense().ddim_steps:
            yield f"{self.ddim_steps} denoising steps"
        if self.text_tokens != CompileConfig.dense().text_tokens:
            yield f"{self.text_tokens} text tokens"
        if self.noise:
            yield f"initial noises of set {self.noise}"

    def calibration(self, frames: Sequence[Frame]) -> list[Frame]:
        """Return the frames to calibrate on, out of all."""
        left_out = None if self.without is None else TASKS[self.without].instruction
        found: dict[str, list[Frame]] = {}
        for frame in frames:
            if frame.instruction != left_out:
                found.setdefault(frame.instruction, []).append(frame)
        return [frame for each in found.values() for frame in each[: self.frames]]

    def config(self, sizes: ModelSizes) -> CompileConfig:
        """Return the compile settings for a policy of these sizes.

        The key tokens keep the paper's proportion, 4 of 56.
        """
        tokens = round(self.tokens * sizes.patches)
        layers = self.layers if isinstance(self.layers, tuple) else round(self.layers * sizes.language.layers)
        return CompileConfig(
            keep_layers=None if layers == sizes.language.layers else layers,
            layer_rule=next((rule for rule in LAYER_RULES if rule == self.layer_rule), "importance"),
            mlp_keep=self.mlp_keep,
            visual_tokens=None if tokens == sizes.patches else tokens,
            key_tokens=max(1, round(tokens / 14)),
            task_share=0.5,
            token_rule=self.token_rule,
            merge_tokens=self.merge,
            vision_mlp_keep=self.vision_mlp_keep,
            repair=self.repair,
            repair_frames=min(40, self.frames or 40),
            cache_interval=self.cache_interval,
            cache_steps=self.cache_steps,
            cache_extrapolate=self.cache_steps is not None,
            ddim_steps=self.ddim_steps,
            solver="ddim" if self.solver_steps is None else "dpm++",
            solver_steps=self.solver_steps,
            text_tokens=self.text_tokens,
        )


PAPER = Recipe(layers=22 / 32, mlp_keep=0.75, tokens=56 / 256, cache_interval=5)
"""The paper's headline row in proportion: 69 % of the layers, 75 % of the neurons, 22 % of the tokens, N = 5."""

OURS = replace(PAPER, token_rule="coverage", merge=True, repair="all")
"""The paper's budgets with tokens that cover the image, merging, and repair."""

RECIPES: dict[str, Recipe] = {
    "dense": Recipe(),
    "dense-again": Recipe(),
    "dense-w18": Recipe(text_tokens=18),
    "dense-noise-1": Recipe(noise=1),
    "dense-noise-2": Recipe(noise=2),
    "layers-11": Recipe(layers=11 / 12),
    "layers-10": Recipe(layers=10 / 12),
    "layers-9": Recipe(layers=9 / 12),
    "layers-8": Recipe(layers=8 / 12),
    "mlp-75": Recipe(mlp_keep=0.75),
    "tokens-44": Recipe(tokens=112 / 256),
    "tokens-22": Recipe(tokens=56 / 256),
    "tokens-11": Recipe(tokens=28 / 256),
    "cache-2": Recipe(cache_interval=2),
    "cache-5": Recipe(cache_interval=5),
    "cache-10": Recipe(cache_interval=10),
    "ddim-5": Recipe(ddim_steps=5),
    "layers-tokens": replace(PAPER, mlp_keep=1.0, cache_interval=1),
    "layers-mlp": replace(PAPER, tokens=1.0, cache_interval=1),
    "layers-mlp-cache": replace(PAPER, tokens=1.0),
    "tokens-cache": replace(PAPER, layers=1.0, mlp_keep=1.0),
    "efficientvla": PAPER,
    "l28-t112": Recipe(layers=28 / 32, mlp_keep=0.75, tokens=112 / 256, cache_interval=5),
    "random-layers-1": Recipe(layers=8 / 12, layer_rule="random", layer_seed=1),
    "random-layers-2": Recipe(layers=8 / 12, layer_rule="random", layer_seed=2),
    "random-layers-3": Recipe(layers=8 / 12, layer_rule="random", layer_seed=3),
    "last-layers": Recipe(layers=8 / 12, layer_rule="last"),
    "random-tokens": Recipe(tokens=56 / 256, random_tokens=True),
    "random-tokens-11": Recipe(tokens=28 / 256, random_tokens=True),
    "layers-8-keep-last": Recipe(layers=8 / 12, layer_rule="keep-last"),
    "layers-8-cognition": Recipe(layers=8 / 12, layer_rule="cognition"),
    "layers-8-greedy": Recipe(layers=8 / 12, layer_rule="greedy"),
    "layers-9-greedy": Recipe(layers=9 / 12, layer_rule="greedy"),
    "layers-10-greedy": Recipe(layers=10 / 12, layer_rule="greedy"),
    "efficientvla-greedy": replace(PAPER, layer_rule="greedy"),
    "mild-9": Recipe(layers=9 / 12, layer_rule="greedy", mlp_keep=0.75, tokens=112 / 256, cache_interval=2),
    "mild-9-all-tokens": Recipe(layers=9 / 12, layer_rule="greedy", mlp_keep=0.75, cache_interval=5),
    "mild-10-all-tokens": Recipe(layers=10 / 12, layer_rule="greedy", mlp_keep=0.75, cache_interval=5),
    "mild-12": Recipe(mlp_keep=0.75, tokens=112 / 256, cache_interval=5),
    "repair": replace(PAPER, repair="all"),
    "repair-last": replace(PAPER, repair="last"),
    "coverage": replace(OURS, repair="none"),
    "coverage-repair": OURS,
    "coverage-repair-last": replace(OURS, repair="last"),
    "coverage-repair-40": replace(OURS, frames=8),
    "coverage-repair-100": replace(OURS, frames=20),
    "greedy-coverage-repair": replace(OURS, layer_rule="greedy"),
    "greedy-coverage-repair-gaps": replace(OURS, layer_rule="greedy", repair="gaps"),
    **{f"coverage-repair-without-{task}": replace(OURS, without=task) for task in TASKS},
    # the preset "fast" at a text budget that holds every instruction of the demo policy
    "fast-w18": replace(
        OURS,
        layers=16 / 32,
        layer_rule="greedy",
        mlp_keep=0.25,
        vision_mlp_keep=0.25,
        repair="last",
        solver_steps=2,
        cache_interval=1,
        text_tokens=18,
    ),
    # what `evla demo` did before it repaired
    "demo": Recipe(layers=10 / 12, layer_rule="greedy", mlp_keep=0.75, tokens=112 / 256, cache_interval=5),
}
"""The ablation: every pass alone, the paper's combinations (Table 5) in proportion, controls that must look worse."""

_FRONTIER = re.compile(r"l(\d+(?:\.\d+)*)-m(\d+)-t(\d+)-([nks])(\d+)(?:-w(\d+))?(?:-v(\d+))?(?:-r(last|gaps))?")


def frontier_recipe(name: str) -> Recipe | None:
    """Return the recipe of a name such as "l6-m50-t8-n5", None for another name.

    It is `OURS` with other budgets: 6 of 12 layers, 50 % of the neurons, 8 of 64 visual tokens, N=5. Layers may be
    named, "l0.1.2.5.7.9"; "k3" has 3 chosen steps computed and the others extrapolated, "s2" is DPM-Solver++ with 2
    chosen timesteps; "-w18" behind it is a budget of 18 text tokens, "-v25" keeps 25 % of the vision towers' neurons,
    and "-rlast" refits the last layer at most.
    """
    found = _FRONTIER.fullmatch(name)
    if found is None:
        return None
    layers, share, tokens, sampler, number, text, vision, scope = found.groups()
    return replace(
        OURS,
        layers=tuple(map(int, layers.split("."))) if "." in layers else int(layers) / 12,
        mlp_keep=int(share) / 100,
        tokens=int(tokens) / 64,
        text_tokens=int(text or 32),
        vision_mlp_keep=int(vision or 100) / 100,
        repair=next((each for each in REPAIR_SCOPES if each == scope), "all"),
        cache_interval=int(number) if sampler == "n" else 1,
        cache_steps=int(number) if sampler == "k" else None,
        solver_steps=int(number) if sampler == "s" else None,
    )

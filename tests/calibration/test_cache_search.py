"""The search for denoising steps that compute, against compiled graphs that compute the same steps."""

import io
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, fx

from evla_compile.calibration import action_shift
from evla_compile.calibration import progress as progress_bar
from evla_compile.calibration.action_shift import ActionShift
from evla_compile.calibration.cache_search import CachedRun
from evla_compile.calibration.calibrate import calibrate
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import draw_noise
from evla_compile.passes import CacheFeatures, UnrollDiffusion
from evla_compile.settings.budgets.cache import CacheDecision
from evla_compile.settings.config import CompileConfig

FRAMES = [Frame(Image.new("RGB", (56, 56), (shade, 2 * shade, 0)), "pick") for shade in (20, 90)]
CONFIG = CompileConfig.dense(ddim_steps=5, text_tokens=9, batch_size=2)


@pytest.fixture(scope="module")
def features(small_policy: CogACT) -> Tensor:
    """The cognition feature of each frame, its prompt not padded, [F,Z]."""
    ids = torch.tensor([small_policy.processor.prompt_ids("pick")] * 2)
    image = torch.stack([torch.from_numpy(small_policy.processor.image(frame.image)) for frame in FRAMES])
    return small_policy.cognition(image, ids, torch.tensor([ids.shape[1]] * 2))[:, 0]


def cache_shift(policy: CogACT, features: Tensor, config: CompileConfig) -> ActionShift:
    return ActionShift(policy, features, config, partial(CachedRun, policy, config))


def shift_by_graph(
    graph: fx.GraphModule, policy: CogACT, features: Tensor, steps: tuple[int, ...], *, extrapolate: bool
) -> float:
    """Compare compiled samplers on the frames, two at once, for 32 noises of each."""
    sampler = UnrollDiffusion(ddim_steps=5)(graph)[0]
    cached = CacheFeatures(steps=steps, extrapolate=extrapolate)(sampler)[0]
    image = torch.stack([torch.from_numpy(policy.processor.image(frame.image)) for frame in FRAMES])
    ids = torch.tensor([policy.processor.prompt_ids("pick")] * 2)
    noise = [torch.from_numpy(draw_noise((32, 5, 7), seed)) for seed in range(2)]
    length = torch.tensor([ids.shape[1]] * 2)
    moved, whole = [], []
    for row in range(32):
        inputs = (image, ids, length, torch.stack([noise[0][row], noise[1][row]]))
        found, full = (gm(*inputs).clamp(-1, 1) for gm in (cached, sampler))
        moved += [float((found - full)[frame].norm()) for frame in range(2)]
        whole += [float(full[frame].norm()) for frame in range(2)]
    return sum(moved) / sum(whole)


@pytest.mark.parametrize("cfg_scale", [1.5, 1.0])
@pytest.mark.parametrize("extrapolate", [False, True])
def test_it_measures_what_compiled_samplers_do(
    small_policy: CogACT,
    small_graph: fx.GraphModule,
    small_unguided_graph: fx.GraphModule,
    features: Tensor,
    cfg_scale: float,
    extrapolate: bool,
) -> None:
    shift = cache_shift(small_policy, features, replace(CONFIG, cfg_scale=cfg_scale, cache_extrapolate=extrapolate))
    graph = small_graph if cfg_scale > 1 else small_unguided_graph
    for steps in ((0, 1, 3), (0, 2, 3), (0, 4), (0, 1, 3)):
        expected = shift_by_graph(graph, small_policy, features, steps, extrapolate=extrapolate)
        assert shift(steps) == pytest.approx(expected, rel=1e-3)
        assert expected > 0.01
    assert shift((0, 1, 2, 3, 4)) == 0


def test_rows_are_computed_in_parts_with_the_same_result(
    small_policy: CogACT, features: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cache_shift(small_policy, features, CONFIG)((0, 2))
    monkeypatch.setattr(action_shift, "_MOST_ROWS", 24)
    assert cache_shift(small_policy, features, CONFIG)((0, 2)) == pytest.approx(whole, rel=1e-5)


def test_every_frame_has_a_noise_and_few_frames_have_several(small_policy: CogACT, features: Tensor) -> None:
    drawn: list[tuple[tuple[int, ...], int]] = []

    def draw(shape: tuple[int, ...], seed: int) -> Any:
        drawn.append((shape, seed))
        return draw_noise(shape, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(action_shift, "draw_noise", draw)
        for frames, draws in ((1, 64), (2, 32), (3, 22), (64, 1), (65, 1)):
            drawn.clear()
            cache_shift(small_policy, features[:1].repeat(frames, 1), CONFIG)
            assert drawn == [((draws, 5, 7), seed) for seed in range(frames)]


def test_what_candidates_begin_with_runs_once(small_policy: CogACT, features: Tensor) -> None:
    config = replace(CONFIG, cache_extrapolate=True)
    lone = [cache_shift(small_policy, features, config)((0, *pair)) for pair in combinations(range(1, 5), 2)]
    shift = cache_shift(small_policy, features, config)
    runs: list[int] = []
    handle = small_policy.action_model.net.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    assert [shift((0, *pair)) for pair in combinations(range(1, 5), 2)] == lone
    handle.remove()
    assert len(runs) == 3 + 1 + 1 + 2 + 1 + 2  # of the candidates in turn: those in front are not computed again


def test_calibration_chooses_the_steps_that_move_actions_least(small_policy: CogACT, features: Tensor) -> None:
    config = replace(CONFIG, cache_steps=3, cache_extrapolate=True)
    plan = calibrate(small_policy, FRAMES, config, progress=False)
    shift = cache_shift(small_policy, features, config)
    shifts = {(0, *pair): shift((0, *pair)) for pair in combinations(range(1, 5), 2)}
    best = min(shifts, key=lambda steps: shifts[steps])
    assert CacheDecision(steps=best, of=5, extrapolate=True, searched=True) in plan.decisions
    plain = calibrate(small_policy, FRAMES, CONFIG, progress=False)
    assert CacheDecision() in plain.decisions
    assert plan.ranges == plain.ranges


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_drawn_on_standard_error_where_it_is_wanted(
    progress: bool, small_policy: CogACT, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr(
        progress_bar, "new_console", lambda stderr: Console(file=drawn, force_terminal=stderr, width=120)
    )
    calibrate(small_policy, FRAMES, replace(CONFIG, cache_steps=2), progress=progress)
    assert ("Choosing denoising steps" in drawn.getvalue()) == progress

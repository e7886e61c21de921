"""The search for timesteps of the solver, against compiled graphs of the solver at the same timesteps."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from torch import Tensor, fx

from evla_compile.calibration.action_shift import ActionShift
from evla_compile.calibration.calibrate import calibrate
from evla_compile.calibration.solver_search import SolverRun
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import draw_noise
from evla_compile.passes import UnrollDiffusion, UnrollSolver
from evla_compile.settings.budgets.sampler import SamplerDecision
from evla_compile.settings.config import CompileConfig

FRAME = Frame(Image.new("RGB", (56, 56), (20, 40, 0)), "pick")
CONFIG = replace(CompileConfig.dense(ddim_steps=5, text_tokens=9), solver="dpm++", solver_steps=2)


@pytest.fixture(scope="module")
def inputs(small_policy: CogACT) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([small_policy.processor.prompt_ids("pick")])
    return torch.from_numpy(small_policy.processor.image(FRAME.image))[None], ids, torch.tensor([ids.shape[1]])


@pytest.fixture(scope="module")
def shift(small_policy: CogACT, inputs: tuple[Tensor, Tensor, Tensor]) -> ActionShift:
    features = small_policy.cognition(*inputs)[:, 0]
    return ActionShift(small_policy, features, CONFIG, partial(SolverRun, small_policy, CONFIG))


def test_it_measures_what_compiled_samplers_do(
    small_policy: CogACT, small_graph: fx.GraphModule, inputs: tuple[Tensor, Tensor, Tensor], shift: ActionShift
) -> None:
    """The small graph takes two rows: the same observation, from two of its 64 noises at a time."""
    noise = torch.from_numpy(draw_noise((64, 5, 7), 0))
    ddim = UnrollDiffusion(ddim_steps=5)(small_graph)[0]
    rows = [value.repeat(2, *[1] * (value.ndim - 1)) for value in inputs]

    def actions(graph: fx.GraphModule) -> Tensor:
        return torch.cat([graph(*rows, pair).clamp(-1, 1) for pair in noise.split(2)]).flatten(1)  # type: ignore[no-untyped-call]  # torch left it so

    expected = actions(ddim)
    for timesteps in ((80, 40), (80, 40, 10), (80, 60, 40, 10), (80, 60, 20), (80,), (80, 60, 20)):
        moved = (actions(UnrollSolver(timesteps=timesteps)(small_graph)[0]) - expected).norm(dim=1)
        assert shift(timesteps) == pytest.approx(float(moved.mean() / expected.norm(dim=1).mean()), rel=1e-3)


def test_what_candidates_begin_with_runs_once(
    small_policy: CogACT, inputs: tuple[Tensor, Tensor, Tensor], shift: ActionShift
) -> None:
    features, runs = small_policy.cognition(*inputs)[:, 0], []
    fresh = ActionShift(small_policy, features, CONFIG, partial(SolverRun, small_policy, CONFIG))
    handle = small_policy.action_model.register_forward_hook(lambda *_: runs.append(1))
    sets = [(80, 60, 40), (80, 60, 20), (80, 40, 20), (80, 40, 20, 10)]
    found = [fresh(timesteps) for timesteps in sets]
    handle.remove()
    assert len(runs) == 3 + 1 + 2 + 1
    assert found == [shift(timesteps) for timesteps in sets]


def test_calibration_chooses_the_timesteps_that_are_nearest_to_ddim(small_policy: CogACT, shift: ActionShift) -> None:
    plan = calibrate(small_policy, [FRAME], CONFIG, progress=False)
    best = min(CONFIG.timestep_sets(), key=shift)
    assert SamplerDecision(timesteps=best, ddim_steps=5) in plan.decisions

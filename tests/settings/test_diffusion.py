"""The noise schedule and the sampler's coefficients against their formulas and CogACT's published tables."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evla_compile.settings.schedule import (
    VALID_DDIM_STEPS,
    check_timesteps,
    cumulative_alphas,
    ddim_schedule,
    ddim_timesteps,
    solver_schedule,
)
from evla_compile.settings.tolerances import relative_error

PUBLISHED_ALPHAS = {
    0: 0.99936872,
    10: 0.96671670,
    20: 0.88910313,
    30: 0.77400621,
    40: 0.63251575,
    50: 0.47826463,
    60: 0.32611525,
    70: 0.19072748,
    80: 0.08514621,
    90: 0.01954438,
}


def test_cumulative_alphas_equal_the_published_table() -> None:
    alphas = cumulative_alphas()
    assert len(alphas) == 100
    assert {t: alphas[t] for t in PUBLISHED_ALPHAS} == pytest.approx(PUBLISHED_ALPHAS, abs=6e-9)
    assert alphas[99] == pytest.approx(2.4286e-7, rel=1e-4)


def test_the_first_beta_follows_the_cosine_and_the_last_is_capped() -> None:
    alphas = cumulative_alphas()
    assert 1 - alphas[0] == pytest.approx(6.312815984e-4, rel=1e-9)
    assert 1 - alphas[99] / alphas[98] == pytest.approx(0.999, rel=1e-12)


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [
        (1, (50,)),
        (2, (50, 0)),
        (4, (75, 50, 25, 0)),
        (5, (80, 60, 40, 20, 0)),
        (8, (91, 78, 65, 52, 39, 26, 13, 0)),
        (10, (90, 80, 70, 60, 50, 40, 30, 20, 10, 0)),
        (100, tuple(range(99, -1, -1))),
    ],
)
def test_timesteps_descend_by_the_smallest_stride(steps: int, timesteps: tuple[int, ...]) -> None:
    assert ddim_timesteps(steps) == timesteps


def test_valid_step_counts_are_those_with_an_integer_stride() -> None:
    assert VALID_DDIM_STEPS == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 15, 17, 20, 25, 34, 50, 100)


@pytest.mark.parametrize("steps", [-1, 0, 11, 14, 51, 99, 101, 2.5, True])
def test_a_step_count_without_a_stride_is_refused_with_the_valid_ones(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"ddim_steps={steps}.*valid: 1, 2, 3, .*, 13, 15, 17, 20, 25, 34, 50, 100"):
        ddim_schedule(steps)


@pytest.mark.parametrize("steps", VALID_DDIM_STEPS)
def test_a_step_equals_the_textbook_formula(steps: int) -> None:
    alphas, schedule = cumulative_alphas(), ddim_schedule(steps)
    assert tuple(step.timestep for step in schedule) == ddim_timesteps(steps)
    following = [alphas[step.timestep] for step in schedule[1:]] + [1.0]
    x, noise = 1.7, -0.6
    for step, b in zip(schedule, following, strict=True):
        a = alphas[step.timestep]
        clean = x / math.sqrt(a) - math.sqrt(1 / a - 1) * noise
        expected = math.sqrt(b) * clean + math.sqrt(1 - b) * noise
        assert step.sample * x + step.noise * noise == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # diffusers with numpy 2
@pytest.mark.parametrize(
    "timesteps", [(90,), (90, 45), (90, 45, 10), (90, 50, 20, 5), (90, 70, 50, 30, 10), (99, 80, 40, 20, 7, 0)]
)
def test_the_solver_equals_that_of_diffusers(timesteps: tuple[int, ...]) -> None:
    """A stand-in for the network: any function of noisy actions and timestep will do."""
    # imported here, since it takes seconds, and other tests of this file need nothing of it
    import diffusers  # noqa: PLC0415

    kind: Any = diffusers.DPMSolverMultistepScheduler

    def predict(x: NDArray[np.float64], timestep: int) -> NDArray[np.float64]:
        return np.tanh(x * (0.3 + timestep / 100)) + 0.1 * np.cos(3 * x)

    alphas = cumulative_alphas()
    betas = [1 - a / before for before, a in zip((1.0, *alphas), alphas, strict=False)]
    scheduler = kind(
        trained_betas=np.array(betas),
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=list(timesteps))
    assert scheduler.timesteps.tolist() == list(timesteps)
    x = np.random.default_rng(5).standard_normal((16, 7))
    expected, data = torch.from_numpy(x), np.zeros_like(x)
    for step in solver_schedule(timesteps):
        noise = predict(x, step.timestep)
        before, data = data, step.data_sample * x + step.data_noise * noise
        x = step.sample * x + step.noise * noise + step.earlier * before
        predicted = torch.from_numpy(predict(expected.numpy(), step.timestep))
        expected = scheduler.step(predicted, step.timestep, expected).prev_sample
        assert relative_error(x, expected.numpy()) <= 1e-5
    assert np.array_equal(x, data)  # the last step yields the actions that it predicts


def test_of_the_solver_neither_the_first_nor_the_last_step_takes_an_earlier_prediction() -> None:
    earlier = [step.earlier for step in solver_schedule((90, 70, 50, 30, 10))]
    assert [value != 0 for value in earlier] == [False, True, True, True, False]


def test_one_step_of_the_solver_is_one_of_ddim() -> None:
    """Of first order they are the same."""
    (ddim,), (solver,) = ddim_schedule(1), solver_schedule((50,))
    assert (solver.sample, solver.noise) == pytest.approx((ddim.sample, ddim.noise), rel=1e-12)
    first, second = solver_schedule((50, 0))[0], ddim_schedule(2)[0]
    assert (first.sample, first.noise) == pytest.approx((second.sample, second.noise), rel=1e-12)


@pytest.mark.parametrize("timesteps", [(), (0, 0), (10, 20), (100,), (5, -1), (9.0, 3), (True, 0), "90", 90, None])
def test_what_are_no_timesteps_is_refused(timesteps: Any) -> None:
    with pytest.raises(ValueError, match=r"solver_timesteps=.*: expected descending timesteps .*\(90, 45, 10\)"):
        check_timesteps("solver_timesteps", timesteps)


def test_timesteps_of_numpy_are_plain() -> None:
    found = check_timesteps("timesteps", np.array([90, 45, 0]))
    assert found == (90, 45, 0)
    assert {type(timestep) for timestep in found} == {int}

"""The noise schedule and the sampler's coefficients against their formulas and CogACT's published tables."""

import math

import pytest

from evla_compile.settings.schedule import VALID_DDIM_STEPS, cumulative_alphas, ddim_schedule, ddim_timesteps

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

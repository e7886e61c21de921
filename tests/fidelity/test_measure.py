"""The figures of a comparison, against the same worked out frame by frame."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evla_compile.errors import CalibrationError
from evla_compile.fidelity.chunks import ActionChunks
from evla_compile.fidelity.measure import Fidelity, compare_chunks
from evla_compile.host.frames import Frame
from evla_compile.host.processor import ActionStatistics
from evla_compile.json_text import to_json_text

STATISTICS = ActionStatistics(
    low=(-0.05, -0.04, -0.03, -0.2, -0.1, -0.3, 0.0),
    high=(0.05, 0.06, 0.03, 0.2, 0.3, 0.3, 1.0),
    mask=(True,) * 6 + (False,),
)
SCALE = np.array([0.05, 0.05, 0.03, 0.2, 0.2, 0.3])
FRAMES, HORIZON = 6, 3
EPISODES = ("a", "a", "b", None, "b", "c")
INSTRUCTIONS = ("go", "go", "stop", "go", "stop", "go")


def chunks(seed: int, draws: int = 3, spread: float = 0.2) -> ActionChunks:
    draw = np.random.Generator(np.random.PCG64(seed))
    samples = draw.normal(0.2, spread, (draws, FRAMES, 5, 7)).clip(-0.9, 0.9)
    return ActionChunks(samples=samples.astype(np.float32), frames="x")


@pytest.fixture(scope="module")
def dense() -> ActionChunks:
    return chunks(0)


@pytest.fixture(scope="module")
def found(dense: ActionChunks) -> ActionChunks:
    """Two draws; frame 4 is far off, and opens the gripper otherwise."""
    samples = dense.samples[:2] + chunks(1, 2, 0.05).samples - np.float32(0.2)
    samples[:, 4, :, :3] += np.float32(0.4)
    samples[1, 4, 0, 6] = 1.0 - samples[1, 4, 0, 6]
    return ActionChunks(samples=samples.astype(np.float32), frames="x")


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    blank = np.zeros((4, 4, 3), dtype=np.uint8)
    return [Frame(blank, word, episode) for word, episode in zip(INSTRUCTIONS, EPISODES, strict=True)]


@pytest.fixture(scope="module")
def fidelity(dense: ActionChunks, found: ActionChunks, frames: list[Frame]) -> Fidelity:
    return compare_chunks(dense, found, STATISTICS, frames, horizon=HORIZON)


def ends(left: ActionChunks, right: ActionChunks, a: int, b: int, frame: int) -> float:
    """Millimetres between where two draws of a frame end, action by action."""
    place = np.zeros(3)
    for step in range(HORIZON):
        x, y = (each.samples[draw, frame, step].astype(np.float64) for each, draw in ((left, a), (right, b)))
        place += (x - y)[:3] * SCALE[:3]
    return 1000.0 * float(np.sqrt(place @ place))


def test_calls_that_end_farther_off_than_own_noise_are_counted(
    dense: ActionChunks, found: ActionChunks, fidelity: Fidelity
) -> None:
    own = [ends(dense, dense, a, b, frame) for frame in range(FRAMES) for a, b in combinations(range(3), 2)]
    floor = float(np.sqrt(np.mean(np.square(own))))
    apart = np.array([[ends(found, dense, draw, draw, frame) for frame in range(FRAMES)] for draw in range(2)])
    assert fidelity.end.own == pytest.approx(floor)
    assert fidelity.beyond_noise == pytest.approx(np.mean(apart > floor))
    assert 0 < fidelity.beyond_noise < 1
    assert fidelity.end.mean == pytest.approx(apart.mean())
    assert fidelity.end.p95 == pytest.approx(np.percentile(apart, 95))
    assert fidelity.end.worst == pytest.approx(apart.mean(axis=0).max())
    assert (fidelity.end.frame, fidelity.frames, fidelity.draws, fidelity.horizon) == (4, FRAMES, 2, HORIZON)


def between(left: ActionChunks, right: ActionChunks, a: int, b: int, frame: int) -> NDArray[np.float64]:
    """Return the vector between where two draws of a frame end, mm."""
    found = np.zeros(3)
    for step in range(HORIZON):
        x, y = (each.samples[draw, frame, step, :3].astype(np.float64) for each, draw in ((left, a), (right, b)))
        found += 1000.0 * (x - y) * SCALE[:3]
    return found


def test_the_headline_is_the_mean_vector_of_the_instruction_that_drifts_farthest(
    dense: ActionChunks, found: ActionChunks, fidelity: Fidelity
) -> None:
    for each in fidelity.instructions:
        places = [place for place, word in enumerate(INSTRUCTIONS) if word == each.instruction]
        mean = np.mean([between(found, dense, draw, draw, place) for draw in range(2) for place in places], axis=0)
        assert each.drift == pytest.approx(np.sqrt(mean @ mean))
        chance = [
            np.linalg.norm(np.mean([between(dense, dense, a, b, place) for place in places], axis=0))
            for a, b in combinations(range(3), 2)
        ]
        assert each.own == pytest.approx(np.mean(chance))
        assert each.frames == len(places)
    assert [each.instruction for each in fidelity.instructions] == ["stop", "go"]  # frame 4 is far off
    assert fidelity.drift == fidelity.instructions[0].drift > fidelity.instructions[1].drift


def test_what_is_off_now_this_way_and_now_that_way_does_not_drift(dense: ActionChunks, frames: list[Frame]) -> None:
    samples = dense.samples[:2] * np.float32(0.5)
    still = replace(dense, samples=dense.samples * np.float32(0.5))
    samples[0, :, :, :3] += np.float32(0.3)
    samples[1, :, :, :3] -= np.float32(0.3)
    found = compare_chunks(still, replace(dense, samples=samples), STATISTICS, frames, horizon=HORIZON)
    assert found.drift == pytest.approx(0.0, abs=1e-4)
    assert found.end.mean > 10


def test_steps_rotations_and_flips(dense: ActionChunks, found: ActionChunks, fidelity: Fidelity) -> None:
    apart = (found.samples.astype(np.float64) - dense.samples[:2])[:, :, :HORIZON]
    moves = np.sqrt(((1000.0 * apart[..., :3] * SCALE[:3]) ** 2).sum(-1)).mean(-1)
    turns = np.rad2deg(np.sqrt(((apart[..., 3:6] * SCALE[3:]).sum(2) ** 2).sum(-1)))
    assert fidelity.step.mean == pytest.approx(moves.mean())
    assert fidelity.rotation.mean == pytest.approx(turns.mean())
    right, left = (each.samples[:, :, :HORIZON, 6] >= 0.5 for each in (dense, found))
    assert fidelity.gripper_flips == pytest.approx(np.mean(left != right[:2]))
    assert fidelity.own_gripper_flips == pytest.approx(
        np.mean([right[a] != right[b] for a, b in combinations(range(3), 2)])
    )
    assert 0 < fidelity.gripper_flips < fidelity.own_gripper_flips


def test_every_dimension_has_its_unit(dense: ActionChunks, found: ActionChunks, fidelity: Fidelity) -> None:
    apart = np.abs(found.samples.astype(np.float64) - dense.samples[:2])[:, :, :HORIZON]
    assert [(each.name, each.unit) for each in fidelity.dimensions] == [
        *(("x", "mm"), ("y", "mm"), ("z", "mm"), ("roll", "degrees"), ("pitch", "degrees"), ("yaw", "degrees")),
        ("gripper", "flips"),
    ]
    for place, factor in enumerate([1000.0] * 3 + [180 / np.pi] * 3):
        assert fidelity.dimensions[place].mean == pytest.approx(factor * SCALE[place] * apart[..., place].mean())
    assert fidelity.dimensions[6].mean == pytest.approx(fidelity.gripper_flips)


def test_episodes_are_listed_the_farthest_first(dense: ActionChunks, found: ActionChunks, fidelity: Fidelity) -> None:
    assert (fidelity.episodes[0].episode, fidelity.episodes[0].frames) == ("b", 2)
    assert {(each.episode, each.frames) for each in fidelity.episodes} == {("a", 2), ("b", 2), ("c", 1)}
    mean = np.mean([ends(found, dense, draw, draw, frame) for draw in range(2) for frame in (2, 4)])
    assert fidelity.episodes[0].mean == pytest.approx(mean)
    assert fidelity.episodes[0].beyond_noise >= 0.5


def test_a_policy_that_does_the_same_is_nowhere_beyond(dense: ActionChunks, frames: list[Frame]) -> None:
    same = compare_chunks(dense, dense, STATISTICS, frames, horizon=HORIZON)
    assert (same.drift, same.beyond_noise, same.end.mean, same.step.worst, same.gripper_flips) == (
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
    )
    assert same.end.own > 0


def test_what_is_beyond_the_horizon_does_not_count(
    dense: ActionChunks, found: ActionChunks, frames: list[Frame], fidelity: Fidelity
) -> None:
    samples = found.samples.copy()
    samples[:, :, HORIZON:] = -samples[:, :, HORIZON:]
    assert compare_chunks(dense, replace(found, samples=samples), STATISTICS, frames, horizon=HORIZON) == fidelity


def test_what_a_robot_does_not_get_does_not_count(dense: ActionChunks, frames: list[Frame]) -> None:
    """Samples are clipped before they are scaled, so that 1 and 2 are the same action."""
    samples = dense.samples.copy()
    samples[:, 0, 0, 0] = 1.0
    beyond = samples.copy()
    beyond[:, 0, 0, 0] = 2.0
    found = compare_chunks(
        replace(dense, samples=samples), replace(dense, samples=beyond), STATISTICS, frames, horizon=HORIZON
    )
    assert found.end.mean == 0.0


def test_it_prints_and_is_json(fidelity: Fidelity) -> None:
    assert f"at 'stop' the hand drifts {fidelity.drift:.1f} mm in 3 actions" in fidelity.line()
    assert f"{fidelity.beyond_noise:.1%} of 12 calls end farther off" in fidelity.line()
    assert f"({fidelity.end.own:.1f} mm)" in fidelity.line()
    assert to_json_text(fidelity.to_json())


@pytest.mark.parametrize(
    ("dense_change", "found_change", "message"),
    [
        ({"frames": "y"}, {}, "run both on the same frames"),
        ({}, {"samples": np.zeros((2, 5, 5, 7), dtype=np.float32)}, "run both on the same frames"),
        ({"samples": np.zeros((1, FRAMES, 5, 7), dtype=np.float32)}, {}, "two draws or more"),
        ({}, {"samples": np.zeros((4, FRAMES, 5, 7), dtype=np.float32)}, "--draws 3 or fewer"),
    ],
)
def test_chunks_that_do_not_go_together_are_refused(
    dense_change: dict[str, Any],
    found_change: dict[str, Any],
    message: str,
    dense: ActionChunks,
    found: ActionChunks,
    frames: list[Frame],
) -> None:
    with pytest.raises(CalibrationError, match=message):
        compare_chunks(
            replace(dense, **dense_change), replace(found, **found_change), STATISTICS, frames, horizon=HORIZON
        )


@pytest.mark.parametrize("horizon", [0, 6, 2.0])
def test_a_horizon_out_of_range_is_refused(
    horizon: Any, dense: ActionChunks, found: ActionChunks, frames: list[Frame]
) -> None:
    with pytest.raises(ValueError, match=r"horizon=.*from 1 to 5"):
        compare_chunks(dense, found, STATISTICS, frames, horizon=horizon)


def test_other_frames_in_number_are_refused(dense: ActionChunks, found: ActionChunks, frames: list[Frame]) -> None:
    with pytest.raises(ValueError, match="5 frames are given for chunks on 6"):
        compare_chunks(dense, found, STATISTICS, frames[:5], horizon=HORIZON)

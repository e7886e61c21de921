"""SIMPLER's protocol against hand-made cases."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evla_compile.host.simpler import (
    GOOGLE_ROBOT,
    WIDOWX,
    AdaptiveEnsembler,
    GoogleRobotPostprocessor,
    WidowXPostprocessor,
    axis_angle,
)

Floats = NDArray[np.float64]


def chunks(count: int, steps: int = 16) -> Floats:
    return np.random.default_rng(0).normal(size=(count, steps, 7))


def action(gripper: float) -> Floats:
    return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gripper])


def about_x(angle: float) -> Floats:
    return np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])


def about_y(angle: float) -> Floats:
    return np.array([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])


def about_z(angle: float) -> Floats:
    return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])


def matrix(rotation: Floats) -> Floats:
    """Rodrigues' formula: the matrix of a rotation given as axis times angle."""
    angle = float(np.linalg.norm(rotation))
    x, y, z = rotation / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross))


def test_ensembler_without_weighting_averages_the_rows_for_now_over_a_growing_window() -> None:
    past = chunks(5)
    ensembler = AdaptiveEnsembler(horizon=3, alpha=0.0)
    for now in range(5):
        rows = [past[predicted][now - predicted] for predicted in range(max(0, now - 2), now + 1)]
        np.testing.assert_allclose(ensembler.add(past[now]), np.mean(rows, axis=0), rtol=1e-12)


def test_first_action_is_the_first_row_of_the_chunk() -> None:
    (chunk,) = chunks(1)
    np.testing.assert_allclose(AdaptiveEnsembler(horizon=7).add(chunk), chunk[0], rtol=1e-12)


def test_weights_follow_the_cosine_with_the_newest_prediction() -> None:
    older, newer = np.zeros((2, 7)), np.zeros((2, 7))
    older[1] = [0, 2, 0, 0, 0, 0, 0]
    newer[0] = [3, 0, 0, 0, 0, 0, 0]
    ensembler = AdaptiveEnsembler(horizon=2, alpha=2.0)
    ensembler.add(older)

    # The newest agrees with itself (cosine 1), the older one is orthogonal (cosine 0).
    share = math.exp(2.0) / (math.exp(2.0) + 1.0)
    np.testing.assert_allclose(ensembler.add(newer), [3 * share, 2 * (1 - share), 0, 0, 0, 0, 0], rtol=1e-6)


def test_weights_sum_to_one() -> None:
    ensembler = AdaptiveEnsembler(horizon=7, alpha=1.0)
    chunk = np.tile(np.arange(1.0, 8.0), (16, 1))
    for _ in range(9):
        np.testing.assert_allclose(ensembler.add(chunk), chunk[0], rtol=1e-12)


def test_actions_of_zeros_average_to_zeros() -> None:
    ensembler = AdaptiveEnsembler(horizon=2)
    for _ in range(2):
        np.testing.assert_array_equal(ensembler.add(np.zeros((16, 7))), np.zeros(7))


def test_reset_ensembler_knows_no_past() -> None:
    first, second = chunks(2)
    ensembler = AdaptiveEnsembler(horizon=2)
    ensembler.add(first)
    ensembler.reset()
    np.testing.assert_allclose(ensembler.add(second), second[0], rtol=1e-12)


def test_ensembler_keeps_its_own_copy_of_a_chunk() -> None:
    first, second = chunks(2)
    buffer = first.copy()
    ensembler = AdaptiveEnsembler(horizon=2, alpha=0.0)
    ensembler.add(buffer)
    buffer[:] = 1e6
    np.testing.assert_allclose(ensembler.add(second), (first[1] + second[0]) / 2, rtol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (16, 6), (1, 16, 7)])
def test_chunk_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[A,7\] with A of at least horizon=3"):
        AdaptiveEnsembler(horizon=3).add(np.zeros(shape))


def test_chunk_that_is_not_finite_is_refused_and_forgotten() -> None:
    (chunk,) = chunks(1)
    ensembler = AdaptiveEnsembler(horizon=2)
    with pytest.raises(ValueError, match="must be finite"):
        ensembler.add(np.full((16, 7), np.nan))
    np.testing.assert_allclose(ensembler.add(chunk), chunk[0], rtol=1e-12)


def test_horizon_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="horizon=0"):
        AdaptiveEnsembler(horizon=0)


@pytest.mark.parametrize(
    ("euler", "expected"),
    [
        ((0.3, 0.0, 0.0), [0.3, 0.0, 0.0]),
        ((0.0, -0.4, 0.0), [0.0, -0.4, 0.0]),
        ((0.0, 0.0, 1.2), [0.0, 0.0, 1.2]),
        ((math.pi, 0.0, 0.0), [math.pi, 0.0, 0.0]),
        ((0.0, 0.0, -math.pi), [0.0, 0.0, -math.pi]),
        ((math.pi - 1e-9, 0.0, 0.0), [math.pi - 1e-9, 0.0, 0.0]),
        ((math.pi / 2, math.pi / 2, 0.0), [2 * math.pi / 3 / math.sqrt(3)] * 2 + [-2 * math.pi / 3 / math.sqrt(3)]),
    ],
)
def test_axis_and_angle_of_hand_made_rotations(euler: tuple[float, float, float], expected: list[float]) -> None:
    np.testing.assert_allclose(axis_angle(*euler), expected, rtol=1e-12, atol=1e-12)


def test_no_rotation_is_zeros() -> None:
    np.testing.assert_array_equal(axis_angle(0.0, 0.0, 0.0), np.zeros(3))


@pytest.mark.parametrize("angle", [1e-3, 1e-8, 1e-160])
def test_tiny_rotations_keep_their_digits(angle: float) -> None:
    np.testing.assert_allclose(axis_angle(angle, 0.0, 0.0), [angle, 0.0, 0.0], rtol=1e-12)


def test_rotations_are_about_the_fixed_axes_in_the_order_x_y_z() -> None:
    for roll, pitch, yaw in np.random.default_rng(3).uniform(-1.4, 1.4, size=(20, 3)):
        expected = about_z(yaw) @ about_y(pitch) @ about_x(roll)
        np.testing.assert_allclose(matrix(axis_angle(roll, pitch, yaw)), expected, atol=1e-12)


def test_command_carries_translation_rotation_and_gripper_in_order() -> None:
    command = WidowXPostprocessor()(np.array([0.1, -0.2, 0.3, 0.0, 0.0, 0.5, 0.9]))

    np.testing.assert_array_equal(command.world_vector, [0.1, -0.2, 0.3])
    np.testing.assert_allclose(command.rot_axangle, [0.0, 0.0, 0.5], rtol=1e-12)
    np.testing.assert_allclose(command.array, [0.1, -0.2, 0.3, 0.0, 0.0, 0.5, 1.0], rtol=1e-12)


@pytest.mark.parametrize(("opening", "expected"), [(1.0, 1.0), (0.51, 1.0), (0.5, -1.0), (0.0, -1.0)])
def test_widowx_gripper_is_absolute_and_has_no_memory(opening: float, expected: float) -> None:
    postprocessor = WidowXPostprocessor()
    postprocessor(action(1.0 - opening))
    assert postprocessor(action(opening)).gripper == expected
    postprocessor.reset()
    assert postprocessor(action(opening)).gripper == expected


# Per step the gripper opening that the policy asks for, and the command that must leave.
GRIPPER_TRACE = [
    (1.0, 0.0),  # the first opening becomes the reference
    (0.9, 0.1),  # small changes pass as they are, measured from the reference
    (0.6, 0.4),
    (0.2, 0.8),  # beyond 0.5 from the reference, though 0.4 from the step before: latched, reference 0.2
    (0.2, 0.8),
    (1.0, 0.8),  # while latched nothing else counts
    (0.0, 0.8),
    (1.0, 0.8),
    (0.2, 0.8),
    (0.2, 0.8),
    (0.2, 0.8),
    (0.2, 0.8),
    (0.9, 0.8),  # the tenth and last repetition
    (0.3, -0.1),  # free again, reference still 0.2
    (0.9, -0.7),  # latched the other way, reference 0.9
    (0.9, -0.7),
    (0.9, -0.7),
    (0.9, -0.7),
    (0.9, -0.7),
    (0.9, -0.7),
    (0.9, -0.7),
    (0.9, -0.7),
    (0.9, -0.7),
    (0.1, -0.7),  # the tenth
    (0.1, 0.8),  # a change beyond 0.5 is latched again at once
]


def test_google_gripper_follows_the_hand_made_trace() -> None:
    postprocessor = GoogleRobotPostprocessor()
    commands = [postprocessor(action(opening)).gripper for opening, _ in GRIPPER_TRACE]
    np.testing.assert_allclose(commands, [expected for _, expected in GRIPPER_TRACE], atol=1e-12)


def test_reset_google_gripper_forgets_reference_and_latch() -> None:
    postprocessor = GoogleRobotPostprocessor()
    for opening in (1.0, 0.0):
        postprocessor(action(opening))
    postprocessor.reset()
    assert [postprocessor(action(opening)).gripper for opening in (0.5, 0.25)] == [0.0, 0.25]


def test_change_of_exactly_one_half_is_not_latched() -> None:
    postprocessor = GoogleRobotPostprocessor()
    assert [postprocessor(action(opening)).gripper for opening in (1.0, 0.5, 0.75)] == [0.0, 0.5, 0.25]


@pytest.mark.parametrize("postprocessor", [WidowXPostprocessor(), GoogleRobotPostprocessor()], ids=["widowx", "google"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [(np.zeros((16, 7)), r"expected \[7\]"), (np.zeros(6), r"expected \[7\]"), (action(math.nan), "must be finite")],
)
def test_action_of_another_kind_is_refused(
    postprocessor: WidowXPostprocessor | GoogleRobotPostprocessor, bad: Floats, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        postprocessor(bad)


def test_robots_run_as_published() -> None:
    assert (WIDOWX.unnorm_key, WIDOWX.horizon, WIDOWX.sticky_repeat) == ("bridge_orig", 7, 1)
    assert (GOOGLE_ROBOT.unnorm_key, GOOGLE_ROBOT.horizon, GOOGLE_ROBOT.sticky_repeat) == (
        "fractal20220817_data",
        2,
        10,
    )


def test_chunks_whose_average_overflows_are_refused() -> None:
    ensembler = AdaptiveEnsembler(2)
    ensembler.add(np.zeros((2, 7)))
    with pytest.raises(ValueError, match="actions must be finite, a robot must not move on others"):
        ensembler.add(np.full((2, 7), 1e200))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e3, True, "0.1", None])
def test_an_alpha_that_is_no_number_in_range_is_refused(alpha: Any) -> None:
    with pytest.raises(ValueError, match=r"alpha=.*: expected a number in \[-100.0, 100.0\]"):
        AdaptiveEnsembler(2, alpha)

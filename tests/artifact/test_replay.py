"""The one comparison with recorded cases: every recorded value is compared, or there is an error."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evla_compile.artifact.cases import RecordedCase, probe
from evla_compile.artifact.replay import replay, stage_errors
from evla_compile.errors import VerificationError
from evla_compile.host.inputs import GraphInputs, InputSignature

SAMPLES = np.linspace(-2, 2, 35, dtype=np.float32).reshape(1, 5, 7)
COGNITION = np.linspace(1, 4, 8, dtype=np.float32)
KEPT = np.array([[1, 5, 7, 9]])
INPUTS = GraphInputs.blank(
    InputSignature(batch_size=1, image_side=14, text_tokens=9, chunk=5, action_width=7, vocabulary=9)
)
CASE = RecordedCase(inputs=INPUTS, outputs={"samples": SAMPLES, "kept_patches": KEPT}, stages={"cognition": COGNITION})
FOUND: Mapping[str, NDArray[Any]] = {"samples": SAMPLES, "kept_patches": KEPT, "cognition": COGNITION[None]}


def compare(found: Mapping[str, NDArray[Any]], cases: list[RecordedCase]) -> dict[str, float]:
    return replay("this policy", lambda _: found, cases, precision="float16", text_tokens=9)


def test_what_is_equal_has_no_error() -> None:
    assert compare(FOUND, [CASE]) == {"cognition": 0.0, "samples": 0.0, "kept_patches": 0.0}


@pytest.mark.parametrize("order", [1, -1])
def test_the_worst_case_counts(order: int) -> None:
    near, far = (RecordedCase(inputs=INPUTS, outputs={"samples": SAMPLES * factor}) for factor in (1.001, 1.004))
    errors = compare(FOUND, [near, far][::order])
    assert errors == {"samples": pytest.approx(0.004 / 1.004, rel=1e-3)}


def test_patches_are_measured_by_the_share_that_is_missing() -> None:
    assert stage_errors(CASE, {**FOUND, "kept_patches": np.array([[5, 2, 9, 1]])}, 9)["kept_patches"] == 0.25


@pytest.mark.parametrize("name", ["samples", "kept_patches", "cognition"])
def test_a_value_that_is_not_there_is_an_error(name: str) -> None:
    found = {("renamed" if known == name else known): value for known, value in FOUND.items()}
    with pytest.raises(VerificationError, match=f"this policy: {name} was recorded, and no value has this name: found"):
        compare(found, [CASE])


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(VerificationError, match="this policy: nothing was compared"):
        compare(FOUND, [])
    with pytest.raises(VerificationError, match="this policy: nothing was compared"):
        compare(FOUND, [RecordedCase(inputs=INPUTS, outputs={})])
    empty = RecordedCase(inputs=INPUTS, outputs={"samples": SAMPLES[:0]})
    with pytest.raises(VerificationError, match="samples cannot be compared: the reference has no values"):
        compare({"samples": SAMPLES[:0]}, [empty])


@pytest.mark.parametrize(("name", "value"), [("samples", SAMPLES[:, :4]), ("kept_patches", np.arange(20)[None])])
def test_another_shape_is_an_error(name: str, value: NDArray[Any]) -> None:
    with pytest.raises(
        VerificationError, match=rf"{name} has the shape \[1, .*the reference \[1, .*: do not deploy it"
    ):
        compare({**FOUND, name: value}, [CASE])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_overflows_is_an_error_that_names_its_stage(value: float) -> None:
    with pytest.raises(VerificationError, match="this policy: cognition cannot be compared: 8 of its 8 values"):
        compare({**FOUND, "cognition": np.full((1, 8), value, np.float32)}, [CASE])


def test_every_case_runs_on_its_own_inputs() -> None:
    draws = [np.random.Generator(np.random.PCG64(seed)).standard_normal((1, 5, 7), np.float32) for seed in (0, 1)]
    cases = [RecordedCase(inputs=replace(INPUTS, noise=noise), outputs={"samples": 2 * noise}) for noise in draws]
    errors = replay("it", lambda inputs: {"samples": 2 * inputs.noise}, cases, precision="float32", text_tokens=9)
    assert errors == {"samples": 0.0}


@pytest.mark.parametrize("text_tokens", [3, 5])
def test_of_a_layer_the_text_rows_are_compared_and_no_others(text_tokens: int) -> None:
    recorded, found = (np.random.Generator(np.random.PCG64(seed)).standard_normal((1, 9, 4)) for seed in (0, 1))
    found[:, 1 - text_tokens :] = recorded[:, 1 - text_tokens :]
    case = RecordedCase(inputs=INPUTS, outputs={}, stages={"layers.0": probe("layers.0", recorded, text_tokens)})
    assert replay("it", lambda _: {"layers.0": found}, [case], precision="float32", text_tokens=text_tokens) == {
        "layers.0": 0.0
    }
    found[:, 1 - text_tokens] += 1
    with pytest.raises(VerificationError, match=r"it: layers\.0 is"):
        replay("it", lambda _: {"layers.0": found}, [case], precision="float32", text_tokens=text_tokens)


@pytest.mark.parametrize("order", [1, -1])
def test_of_patches_the_worst_row_counts(order: int) -> None:
    case = RecordedCase(inputs=INPUTS, outputs={"kept_patches": np.array([[1, 5, 7, 9], [2, 3, 4, 6]][::order])})
    found = {"kept_patches": np.array([[9, 1, 7, 5], [2, 3, 0, 1]][::order])}
    assert stage_errors(case, found, 9) == {"kept_patches": 0.5}


def test_errors_come_in_data_flow_order() -> None:
    assert list(compare(FOUND, [CASE, CASE])) == ["cognition", "samples", "kept_patches"]

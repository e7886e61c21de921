"""The record of a certificate: what it says, its JSON, and that a record which contradicts itself is refused."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evla_compile.certificate.certify import certify
from evla_compile.certificate.p_value import hoeffding_bentkus
from evla_compile.certificate.record import MAX_COUNT, MAX_SETTINGS, Certificate, SettingTest
from evla_compile.errors import CalibrationError
from evla_compile.json_text import to_json_text

EPISODES = 60


def made(*means: float, names: tuple[str, ...] = ("dense", "balanced", "fast", "faster")) -> Certificate:
    return certify(
        names,
        [np.full(EPISODES, mean) for mean in (*means, *[0.0] * (len(names) - len(means)))],
        alpha=0.1,
        tau=0.05,
        tau_unit="of the gripper's range",
        delta=0.05,
        frames=2400,
        frames_digest="0123456789abcdef",
        split_seed=4,
        certifying_share=0.5,
    )


@pytest.fixture
def certificate() -> Certificate:
    return made(0.0, 0.02, 0.3)


def test_json_gives_the_same_certificate_back(certificate: Certificate) -> None:
    for given in (certificate, made(0.5), made()):
        assert Certificate.from_json(json.loads(to_json_text(given.to_json()))) == given
    assert certificate.to_json()["certified"] == "balanced"
    assert made(0.5).to_json()["certified"] is None


def test_the_json_names_all_that_the_certificate_rests_on(certificate: Certificate) -> None:
    data = certificate.to_json()
    assert {name: data[name] for name in data if name != "tested"} == {
        "format": 1,
        "certified": "balanced",
        "alpha": 0.1,
        "tau": 0.05,
        "tau_unit": "of the gripper's range",
        "delta": 0.05,
        "episodes": 60,
        "frames": 2400,
        "not_reached": ["faster"],
        "frames_digest": "0123456789abcdef",
        "split_seed": 4,
        "certifying_share": 0.5,
        "method": "learn-then-test, fixed sequence, hoeffding-bentkus",
    }
    p_values = [hoeffding_bentkus(mean, EPISODES, 0.1) for mean in (0.0, 0.02, 0.3)]
    assert [list(entry.values()) for entry in data["tested"]] == [
        ["dense", 0.0, p_values[0], True],
        ["balanced", pytest.approx(0.02), pytest.approx(p_values[1]), True],
        ["fast", pytest.approx(0.3), 1.0, False],
    ]


def test_the_statement_says_what_is_certified_and_what_is_not(certificate: Certificate) -> None:
    text = certificate.statement()
    assert text.startswith(
        "The setting 'balanced' is certified: with probability at least 0.95 over the draw of the certifying episodes,"
        " the expected fraction of control steps of an episode at which the action deviates from the dense policy's by"
        " more than 0.05 of the gripper's range is at most 0.1, for episodes drawn independently like these,"
    )
    for part in (
        "60 episodes with 2400 frames (digest 0123456789abcdef)",
        "seed 4",
        "3 of 4 settings were tested",
        "nothing about other scenes, tasks or cameras, and nothing about success",
        "nothing at all if any of these frames were used for choosing",
        "if the bound or the split was chosen by its result",
        "not of the compiled policy's own",
    ):
        assert part in text
    assert "\n" not in text


def test_a_bound_is_stated_as_it_was_tested() -> None:
    stated = replace(made(), alpha=0.10000001, tested=retested(0.10000001), delta=2.5e-3).statement()
    assert "at least 0.9975 over" in stated
    assert "at most 0.10000001," in stated


def retested(alpha: float) -> tuple[SettingTest, ...]:
    return tuple(replace(test, p_value=hoeffding_bentkus(0.0, EPISODES, alpha)) for test in made().tested)


def test_a_statement_of_no_certified_setting_says_so() -> None:
    text = made(0.5).statement()
    assert text.startswith("No setting is certified: of the safest, 'dense', it could not be shown")
    assert "its mean over the episodes is 0.5, its p-value 1 where at most 0.05 was needed." in text
    assert "1 of 4 settings were tested" in text
    assert "nothing about success" in text


TAMPERED: dict[str, tuple[dict[str, Any], str]] = {
    "smaller bound": ({"alpha": 0.05}, "p-value"),
    "more episodes": ({"episodes": 61}, "p-value"),
    "fewer wrong": ({"delta": 1e-4}, "expected certified where the p-value is at most delta"),
    "a cheaper one": ({"certified": "fast"}, "certified is 'fast', and by its tests 'balanced'"),
    "none": ({"certified": None}, "certified is None"),
    "one that is not in the sequence": ({"certified": "other"}, "certified is 'other'"),
    "list as the certified one": ({"certified": ["fast"]}, "certified is"),
    "other method": ({"method": "a promise"}, "method="),
    "method of another type": ({"method": []}, "method="),
    "other format": ({"format": 2}, "format=2"),
    "format of another type": ({"format": True}, "format=True"),
    "alpha of another type": ({"alpha": "0.1"}, "alpha="),
    "alpha not finite": ({"alpha": math.nan}, "alpha="),
    "alpha 1": ({"alpha": 1}, "alpha="),
    "delta 0": ({"delta": 0}, "delta="),
    "threshold not finite": ({"tau": math.inf}, "tau="),
    "negative threshold": ({"tau": -1}, "tau="),
    "threshold beyond a float": ({"tau": 10**400}, "tau="),
    "unit of two lines": ({"tau_unit": "m\nall is well"}, "tau_unit is"),
    "no unit": ({"tau_unit": ""}, "tau_unit is"),
    "half a character": ({"tau_unit": "\ud800"}, "tau_unit is"),
    "no episodes": ({"episodes": 0}, "episodes=0"),
    "a fraction of episodes": ({"episodes": 60.0}, "episodes="),
    "episodes beyond reading": ({"episodes": MAX_COUNT + 1}, "episodes="),
    "fewer frames than episodes": ({"frames": 59}, "frames=59 of episodes=60"),
    "digest of another length": ({"frames_digest": "0123"}, "frames_digest="),
    "digest of another type": ({"frames_digest": 0}, "frames_digest="),
    "negative seed": ({"split_seed": -1}, "split_seed="),
    "share of all": ({"certifying_share": 1.0}, "certifying_share="),
    "nothing tested": ({"tested": []}, "0 tested settings"),
    "tests of another type": ({"tested": {}}, "'tested' is"),
    "a test of another type": ({"tested": [1]}, "expected a tested setting"),
    "a test without its p-value": ({"tested": [{"name": "dense"}]}, "expected a tested setting"),
    "not reached of another type": ({"not_reached": "faster"}, "'not_reached' is"),
    "not reached of other values": ({"not_reached": [["faster"]]}, "not_reached is"),
    "one name twice": ({"not_reached": ["dense"]}, "each once"),
    "too many": ({"not_reached": [f"x{place}" for place in range(MAX_SETTINGS)]}, "each once"),
    "unknown key": ({"note": "trust me"}, "a JSON object with the keys"),
}


@pytest.mark.parametrize(("changes", "message"), TAMPERED.values(), ids=TAMPERED)
def test_json_that_is_tampered_with_is_refused(certificate: Certificate, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=f"malformed certificate: .*{message}"):
        Certificate.from_json(certificate.to_json() | changes)


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        (2, {"certified": True}, "'fast' has certified=True"),
        (2, {"p_value": 0.01, "certified": True}, "p-value 0.01 of 'fast': expected 1.0"),
        (2, {"mean_loss": 0.02}, "p-value 1.0 of 'fast'"),
        (1, {"mean_loss": 0.021}, "p-value .* of 'balanced'"),
        (1, {"certified": False}, "'balanced' has certified=False"),
        (0, {"mean_loss": 0.3, "p_value": 1.0, "certified": False}, "tested behind 'dense', which failed"),
        (
            2,
            {"mean_loss": 0.0, "p_value": 0.9**EPISODES, "certified": True},
            "'faster' was not reached, and no setting",
        ),
        (0, {"name": "fast"}, "each once"),
        (0, {"name": 1}, "name is 1"),
        (0, {"mean_loss": 1.5}, "mean_loss="),
        (0, {"mean_loss": True}, "mean_loss="),
        (0, {"p_value": math.nan}, "p_value="),
        (0, {"certified": 1}, "certified="),
        (0, {"note": ""}, "expected a tested setting"),
    ],
)
def test_a_test_that_is_tampered_with_is_refused(
    certificate: Certificate, place: int, changes: dict[str, Any], message: str
) -> None:
    data = deepcopy(certificate.to_json())
    data["tested"][place] |= changes
    with pytest.raises(CalibrationError, match=f"malformed certificate: .*{message}"):
        Certificate.from_json(data)


def test_every_key_is_needed(certificate: Certificate) -> None:
    for name in certificate.to_json():
        data = certificate.to_json()
        del data[name]
        with pytest.raises(CalibrationError, match="a JSON object with the keys"):
            Certificate.from_json(data)


@pytest.mark.parametrize("data", [None, [], "certificate", 1, {}])
def test_other_json_is_refused(data: object) -> None:
    with pytest.raises(CalibrationError, match="expected a certificate, a JSON object with the keys"):
        Certificate.from_json(data)


def test_a_refusal_of_long_values_is_short(certificate: Certificate) -> None:
    for changes in ({"alpha": [0] * 100_000}, {"episodes": "x" * 100_000}, {"tau_unit": "x" * 100_000}):
        with pytest.raises(CalibrationError) as caught:
            Certificate.from_json(certificate.to_json() | changes)
        assert len(str(caught.value)) < 500


def test_numbers_that_json_writes_as_whole_are_read_as_they_were(certificate: Certificate) -> None:
    data = replace(certificate, tau=1.0).to_json() | {"tau": 1}
    assert Certificate.from_json(data).tau == 1.0

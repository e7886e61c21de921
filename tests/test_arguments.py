"""Arguments as callers have them: numpy's numbers and lists where plain ones are meant, refusals that name the rest."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evla_compile.arguments import is_listed, number, whole_number
from evla_compile.exporters.artifact import ExportSettings
from evla_compile.host.frames import Frame, as_frames
from evla_compile.host.simpler import AdaptiveEnsembler
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.engine_settings import EngineSettings
from evla_compile.settings.schedule import check_ddim_steps, ddim_schedule
from evla_compile.verification.verify import verify

WHOLE = {
    "visual_tokens": 56,
    "key_tokens": 5,
    "token_seed": 6,
    "cache_interval": 2,
    "text_tokens": 40,
    "batch_size": 3,
    "keep_layers": 20,
    "ddim_steps": 5,
}
REAL = {"mlp_keep": 0.5, "task_share": 0.25, "cfg_scale": 1.5}


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("name", WHOLE)
def test_numpy_integers_are_whole_numbers_in_every_setting(name: str, kind: type[np.integer[Any]]) -> None:
    config = CompileConfig(**{name: kind(WHOLE[name])})  # type: ignore[arg-type]  # numpy's numbers, on purpose
    assert config == CompileConfig(**{name: WHOLE[name]})  # type: ignore[arg-type]  # the settings differ in type
    assert type(getattr(config, name)) is int
    json.dumps(config.to_json(), allow_nan=False)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, Fraction])
@pytest.mark.parametrize("name", REAL)
def test_numpy_floats_are_numbers_in_every_setting(name: str, kind: Any) -> None:
    config = CompileConfig(**{name: kind(REAL[name])})
    assert config == CompileConfig(**{name: REAL[name]})  # type: ignore[arg-type]  # the settings differ in type
    assert type(getattr(config, name)) is float


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [True, np.True_, np.float64(4.0), "4", np.array(4.5), float("nan")])
def test_what_is_no_whole_number_is_refused_in_every_setting(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        CompileConfig(**{name: value})


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", [True, np.True_, "1.0", np.float32("nan"), float("inf"), 10**400, np.array([1.0])])
def test_what_is_no_number_in_range_is_refused_in_every_setting(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*: expected a number in [(\[]"):
        CompileConfig(**{name: value})


@pytest.mark.parametrize(
    "layers", [[0, 2, 3], (0, np.int64(2), 3), np.array([0, 2, 3]), np.array([0, 2, 3], dtype=np.uint8)]
)
def test_a_list_names_the_layers(layers: Any) -> None:
    config = CompileConfig(keep_layers=layers)
    assert config.keep_layers == (0, 2, 3)
    assert {type(layer) for layer in config.keep_layers} == {int}
    assert hash(config) == hash(CompileConfig(keep_layers=(0, 2, 3)))
    assert CompileConfig(keep_layers=range(4)) == CompileConfig(keep_layers=(0, 1, 2, 3))  # type: ignore[arg-type]  # a range, on purpose


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "at least one"),
        ([0, 0], "must ascend"),
        ([True, 2], "layer indices from 0"),
        ([0, 1.0], "layer indices from 0"),
        ([0, -1], "layer indices from 0"),
        (np.array([[0, 1]]), "layer indices from 0"),
        ("all", "keep_layers='all'"),
        (b"12", "keep_layers=b'12'"),
        ({0: 1}, "keep_layers="),
    ],
)
def test_what_names_no_layers_is_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompileConfig(keep_layers=layers)


@pytest.mark.parametrize("name", [["l22-t56"], None, 3, np.array(["l22-t56"])])
def test_a_preset_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="unknown preset"):
        CompileConfig.preset(name)


def test_the_schedule_takes_numpy_integers() -> None:
    assert ddim_schedule(np.int64(10)) == ddim_schedule(10)  # type: ignore[arg-type]  # numpy's integer, on purpose
    assert type(check_ddim_steps(np.int32(10))) is int


@pytest.mark.parametrize("steps", [True, 10.0, "10", None, [10]])
def test_the_schedule_refuses_what_is_no_whole_number(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"ddim_steps=.* has no integer stride"):
        ddim_schedule(steps)


def test_engine_settings_take_numpy_integers() -> None:
    given: Any = {"workspace_bytes": np.int64(5), "memory_bytes": np.uint32(6), "optimization_level": np.int8(3)}
    settings = EngineSettings(**given)
    assert settings == EngineSettings(workspace_bytes=5, memory_bytes=6, optimization_level=3)
    assert {type(getattr(settings, name)) for name in given} == {int}


@pytest.mark.parametrize("name", ["workspace_bytes", "memory_bytes", "optimization_level"])
@pytest.mark.parametrize("value", [True, 2.0, "2"])
def test_engine_settings_refuse_what_is_no_whole_number(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected a whole number .*, or None"):
        EngineSettings(**{name: value})


def test_the_range_of_a_whole_number_includes_its_ends() -> None:
    assert [whole_number("n", value, low=1, high=3) for value in (1, 3)] == [1, 3]
    for value in (0, 4):
        with pytest.raises(ValueError, match=f"n={value}: expected a whole number from 1 to 3"):
            whole_number("n", value, low=1, high=3)


def test_the_range_of_a_number_may_leave_its_lower_end_out() -> None:
    assert [number("x", value, low=0.0, high=1.0) for value in (0, 1)] == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"x=0: expected a number in \(0.0, 1.0\]"):
        number("x", 0, low=0.0, high=1.0, low_open=True)


@pytest.mark.parametrize("value", ["ab", b"ab", bytearray(2), memoryview(b"ab"), np.array(1), 3, None, {1: 2}, {1}])
def test_text_bytes_and_single_values_are_no_list(value: object) -> None:
    assert not is_listed(value)


@pytest.mark.parametrize("threads", [0, -1, True, 2.0, "2", np.float64(2.0)])
def test_verify_refuses_threads_that_are_no_whole_number_before_it_reads_anything(threads: Any) -> None:
    with pytest.raises(ValueError, match=r"threads=.*: expected a whole number from 1 up, or None"):
        verify("nowhere", threads=threads)


def test_an_ensembler_looks_back_on_a_whole_number_of_chunks() -> None:
    assert AdaptiveEnsembler(np.int64(2)).horizon == 2  # type: ignore[arg-type]  # numpy's integer, on purpose
    given: list[Any] = [0, True, 2.5, "2"]
    for horizon in given:
        with pytest.raises(ValueError, match=r"horizon=.*: expected a whole number from 1 up"):
            AdaptiveEnsembler(horizon)


def test_opset_and_parts_of_an_export_are_whole_numbers() -> None:
    given: Any = {"opset": np.int64(20), "parts": np.uint8(2)}
    settings = ExportSettings(**given)
    assert (type(settings.opset), type(settings.parts)) == (int, int)
    wrong: list[dict[str, Any]] = [{"opset": 20.0}, {"parts": True}, {"parts": 0}, {"opset": "20"}]
    for settings_given in wrong:
        with pytest.raises(ValueError, match=r"=.*: expected a whole number from 1 up"):
            ExportSettings(**settings_given)


def test_a_single_compute_capability_a_list_and_numbers_are_texts() -> None:
    given: list[Any] = ["8.9", ["8.9"], (8.9,), 8.9, np.array(["8.9"])]
    for capabilities in given:
        assert EngineSettings(compute_capabilities=capabilities).compute_capabilities == ("8.9",)
    settings: Any = {"compute_capabilities": [8.6, "12.0"], "timing_cache": "timings.bin"}
    several = EngineSettings(**settings)
    assert several.compute_capabilities == ("8.6", "12.0")
    assert several.timing_cache == Path("timings.bin")


@pytest.mark.parametrize("given", ["sm89", 8, [None], True, "89", [8.9, "x"], b"8.9"])
def test_what_is_no_compute_capability_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"compute_capabilities=.*: expected texts, as in \(\"8.9\", \"12.0\"\)"):
        EngineSettings(compute_capabilities=given)


def test_frames_are_pairs_of_an_image_and_an_instruction() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    pairs: Any = [(image, "go"), [image, "stop"]]
    assert [(type(frame), frame.instruction) for frame in as_frames(pairs)] == [(Frame, "go"), (Frame, "stop")]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ("frames", r"the frames are 'frames': expected observations; evla_compile.read_frames\(path\) reads them"),
        (Path("frames"), r"the frames are PosixPath\('frames'\): expected observations"),
        ([np.zeros((2, 2, 3), np.uint8)], r"frame 0 is a ndarray: expected an \(image, instruction\) pair"),
        ([(1, "go"), (1,)], r"frame 1 is a tuple: expected an \(image, instruction\) pair"),
        (["go"], r"frame 0 is a str: expected an \(image, instruction\) pair"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused(frames: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_frames(frames)

"""What `predict_action` of the torch policy and `kept_tokens` make of their arguments; the networks do not run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import fx, nn

from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.compiler.report import CompileReport
from evla_compile.exporters import artifact
from evla_compile.exporters.artifact import ExportSettings
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.camera_frame import fit
from evla_compile.host.inputs import GraphInputs
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.plan import Plan
from tests.paper_config import paper_config

KEY = "bridge_orig"
Calls = list[tuple[GraphInputs, dict[str, Any]]]


@pytest.fixture
def calls(tiny_policy: CogACT, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the torch policy's networks are given; their samples are the noise."""
    given: Calls = []

    def sample(inputs: GraphInputs, **settings: Any) -> NDArray[Any]:
        given.append((inputs, settings))
        return inputs.noise

    monkeypatch.setattr(tiny_policy, "_sample_inputs", sample)
    return given


def test_the_framing_reaches_the_torch_policy(tiny_policy: CogACT, calls: Calls, frame: Image.Image) -> None:
    for settings in ({}, {"framing": "deploy"}):
        tiny_policy.predict_action(frame, "go", KEY, **settings)  # type: ignore[arg-type]  # settings differ in type
    whole, deployed = (inputs.image[0] for inputs, _ in calls)
    np.testing.assert_array_equal(whole, fit(frame, 224))
    np.testing.assert_array_equal(deployed, fit(frame, 224, "deploy"))


def test_numpy_numbers_reach_the_torch_policy_as_plain_ones(
    tiny_policy: CogACT, calls: Calls, frame: Image.Image
) -> None:
    numbers: Any = {"ddim_steps": np.int64(5), "cfg_scale": np.float32(1.5), "text_tokens": np.uint8(40)}
    tiny_policy.predict_action(frame, "go", KEY, seed=np.int32(3), **numbers)  # type: ignore[arg-type]  # numpy's, on purpose
    ((inputs, settings),) = calls
    assert inputs.input_ids.shape == (1, 40)
    assert settings == {"ddim_steps": 5, "cfg_scale": 1.5}
    assert [type(value) for value in settings.values()] == [int, float]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cfg_scale": 0.5}, r"cfg_scale=0.5: expected a number in \[1.0, 100.0\]"),
        ({"cfg_scale": float("nan")}, "cfg_scale=nan: expected a number"),
        ({"cfg_scale": True}, "cfg_scale=True: expected a number"),
        ({"cfg_scale": "1.5"}, "cfg_scale='1.5': expected a number"),
        ({"ddim_steps": 10.0}, "ddim_steps=10.0 has no integer stride"),
        ({"ddim_steps": True}, "ddim_steps=True has no integer stride"),
        ({"text_tokens": 32.0}, "text_tokens=32.0: expected a whole number from 4 to 2048"),
        ({"text_tokens": 0}, "text_tokens=0: expected a whole number from 4 to 2048"),
        ({"seed": True}, "seed=True: expected a whole number from 0 up"),
        ({"unnorm_key": [KEY]}, r"unnorm_key=\['bridge_orig'\]: expected one dataset for the whole batch"),
        ({"framing": "square"}, "framing='square': expected one of whole, deploy"),
        ({"image": []}, "image: 0 given"),
        ({"image": "frame.png"}, "the image is a str, 'frame.png'"),
        ({"image": b"12345"}, "the image is a bytes of 5"),
    ],
)
def test_what_is_not_meant_is_refused_before_the_networks_run(
    tiny_policy: CogACT, calls: Calls, frame: Image.Image, settings: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"image": frame, "instruction": "go", "unnorm_key": KEY} | settings
    with pytest.raises(ValueError, match=message):
        tiny_policy.predict_action(**given)
    assert not calls


@pytest.mark.parametrize("stack", [list, np.stack], ids=["list", "array"])
def test_the_torch_policy_takes_a_batch_as_a_list_or_an_array(
    tiny_policy: CogACT, calls: Calls, frame: Image.Image, stack: Callable[[Any], Any]
) -> None:
    images = stack([np.asarray(frame), np.asarray(frame)[::-1]])
    actions = tiny_policy.predict_action(images, ["go", "stop"], KEY)
    ((inputs, _),) = calls
    assert actions.shape == (2, 16, 7)
    np.testing.assert_array_equal(inputs.image[1], fit(np.asarray(frame)[::-1], 224))


def test_a_single_stage_is_not_a_sequence_of_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[ExportSettings] = []
    monkeypatch.setattr(artifact, "export_artifact", lambda _, __, given: settings.append(given))
    compiled = object.__new__(CompiledPolicy)
    compiled.export("x.onnx", stages="cognition")
    compiled.export("x.onnx", stages=["cognition", "kept_patches"])
    assert [given.stages for given in settings] == [("cognition",), ("cognition", "kept_patches")]


def test_kept_tokens_take_what_predict_action_takes(
    tiny_policy: CogACT, frame: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = paper_config(keep_layers=None, mlp_keep=1.0, visual_tokens=5)
    compiled = CompiledPolicy(
        graph=fx.GraphModule(nn.Module(), fx.Graph()),
        config=config,
        plan=Plan(decisions=(LayerDecision(keep=(0,)),)),
        sizes=tiny_policy.sizes,
        processor=tiny_policy.processor,
        report=CompileReport(config=config, passes=(), deviations=()),
    )
    seen: list[NDArray[Any]] = []

    def outputs(image: NDArray[Any], *_: Any, **__: Any) -> dict[str, NDArray[Any]]:
        seen.append(image)
        return {"kept_patches": np.arange(5)[None]}

    monkeypatch.setattr(compiled, "outputs", outputs)
    assert compiled.kept_tokens(frame, "go", framing="deploy").shape == (5,)
    assert compiled.kept_tokens(np.asarray(frame)[None], "go").shape == (1, 5)
    np.testing.assert_array_equal(seen[0][0], fit(frame, 224, "deploy"))
    np.testing.assert_array_equal(seen[1][0], fit(frame, 224))

"""Weights that are not finite are named before a policy is measured or compiled."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import evla_compile as evla
from evla_compile.calibration import calibrate as calibration
from evla_compile.compiler import pipeline
from evla_compile.errors import CheckpointError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph import finite_weights
from evla_compile.graph.deferred import DeferredWeight, cut
from evla_compile.graph.finite_weights import check_finite, check_finite_policy
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.plan import Plan
from evla_compile.torch_backend import backend
from evla_compile.torch_backend.dynamo_graph import DynamoGraph

NAME = "llm_backbone.llm.model.layers.1.mlp.up_proj.weight"
DENSE = evla.CompileConfig.dense(text_tokens=9, batch_size=2)


@pytest.fixture
def policy(small_policy: CogACT) -> CogACT:
    """The small policy, to be spoiled."""
    return deepcopy(small_policy)


@pytest.fixture
def extremes_taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that was read through."""
    taken: list[Tensor] = []

    def recorded(weight: Tensor) -> tuple[Tensor, Tensor]:
        taken.append(weight)
        return original(weight)

    original = finite_weights.extremes
    monkeypatch.setattr(finite_weights, "extremes", recorded)
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1_000, 4_095])
def test_a_value_that_is_not_finite_is_named_with_its_tensor_and_place(
    dtype: torch.dtype, value: float, place: int
) -> None:
    weight = torch.ones(64, 64, dtype=dtype)
    check_finite([("a.weight", weight)])
    weight.view(-1)[place] = value
    expected = rf"a\.weight \(1 of 4096 values, the first, {value}, at \[{place // 64}, {place % 64}\]\)"
    with pytest.raises(CheckpointError, match=expected):
        check_finite([("b", torch.ones(3)), ("a.weight", weight), ("empty", torch.ones(0))])


def test_every_tensor_is_named_up_to_a_limit() -> None:
    with pytest.raises(CheckpointError, match=r"7 weights are not finite: t0 .*, t4 .* and 2 more: ") as caught:
        check_finite([(f"t{number}", torch.full((2,), torch.nan)) for number in range(7)])
    assert "t5" not in str(caught.value)


def test_the_largest_finite_values_are_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        limit = torch.finfo(dtype).max
        check_finite([("a", torch.full((1000,), limit, dtype=dtype)), ("b", torch.full((1000,), -limit, dtype=dtype))])


def test_a_deferred_weight_is_judged_by_its_value_without_computing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.ones(4, 4, dtype=torch.float64)
    weight = DeferredWeight(source, dtype=torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(DeferredWeight, "compute", lambda self: pytest.fail("computed"))
        check_finite([("a", weight)])
    source[0, 3] = 1e300  # infinite as float32
    kept = cut(weight, 1, torch.tensor([0, 1]))
    check_finite([("kept", kept)])
    for spoiled in (weight, cut(weight, 1, torch.tensor([1, 3])), weight.T):
        with pytest.raises(CheckpointError, match=r"a \(1 of \d+ values, the first, inf, at"):
            check_finite([("a", spoiled)])


@pytest.mark.parametrize(
    "work",
    [
        lambda policy: evla.compile(policy, DENSE),
        lambda policy: evla.calibrate(policy, [evla.Frame(np.zeros((8, 8, 3), dtype=np.uint8), "lift")], DENSE),
    ],
    ids=["compile", "calibrate"],
)
def test_a_policy_with_weights_that_are_not_finite_is_refused_before_it_is_captured(
    policy: CogACT, work: Callable[[CogACT], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (calibration, pipeline):
        monkeypatch.setattr(module, "capture", lambda *_: pytest.fail("captured before the refusal"))
    policy.get_parameter(NAME)[3, 5] = torch.nan
    with pytest.raises(CheckpointError, match=rf"{NAME} \(1 of 1536 values, the first, nan, at \[3, 5\]\)"):
        work(policy)


def test_the_backend_of_torch_compile_refuses_them_before_it_rewrites() -> None:
    plan = Plan(decisions=(LayerDecision(keep=(0,)),))
    captured = DynamoGraph(fx.GraphModule(nn.Module(), fx.Graph()), {NAME: 0}, ())
    compiled = backend._Compiled(captured, plan, [], "eager", 9)
    with pytest.raises(CheckpointError, match=rf"{NAME} \(1 of 2 values, the first, nan, at \[1\]\)"):
        compiled.prepare([torch.tensor([0.0, torch.nan])])


def test_a_policy_is_read_through_once_and_anew_when_it_was_written(
    policy: CogACT, extremes_taken: list[Tensor]
) -> None:
    check_finite_policy(policy)
    every = len(extremes_taken)
    assert every == len(policy.state_dict())
    check_finite_policy(policy)
    assert len(extremes_taken) == every
    policy.get_parameter(NAME).mul_(2.0)
    check_finite_policy(policy)
    assert len(extremes_taken) == 2 * every
    policy.get_parameter(NAME)[0, 0] = torch.inf
    for _ in range(2):  # a refusal is not remembered as a pass
        with pytest.raises(CheckpointError, match=NAME):
            check_finite_policy(policy)


def test_inference_tensors_are_read_anew_every_time_since_torch_does_not_count_their_writes() -> None:
    with torch.inference_mode():
        module = nn.Linear(2, 2)
    check_finite_policy(module)
    with torch.inference_mode():
        module.weight[1, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"weight \(1 of 4 values, the first, nan, at \[1, 0\]\)"):
        check_finite_policy(module)


def test_a_policy_without_data_is_passed(policy: CogACT) -> None:
    check_finite_policy(policy.to("meta"))

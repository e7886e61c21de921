"""Fingerprints of checkpoints: the same in every form that a policy is loaded in, another for other weights."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, fx, nn

import evla_compile as evla
from evla_compile.calibration.fingerprint import check_checkpoint, fingerprint_weights
from evla_compile.compiler import pipeline
from evla_compile.errors import CalibrationError
from evla_compile.estimate.estimates import skeleton
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.deferred import DeferredWeight, cut
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan
from evla_compile.torch_backend.backend import _Compiled
from evla_compile.torch_backend.dynamo_graph import DynamoGraph

NAME = "llm_backbone.llm.model.layers.2.mlp.up_proj.weight"
DENSE = CompileConfig.dense(text_tokens=9, batch_size=2)


@pytest.fixture
def plan(small_policy: CogACT) -> Plan:
    """A plan that keeps everything, measured on the small policy."""
    return Plan(
        decisions=(LayerDecision(keep=(0, 1, 2, 3)),),
        frames=1,
        checkpoint=fingerprint_weights(small_policy.state_dict()),
    )


def test_the_groups_of_a_checkpoint_are_told_apart(plan: Plan) -> None:
    groups, digests = zip(*plan.checkpoint, strict=True)
    assert sorted(groups) == ["action_model", "llm_backbone", "projector", "vision_backbone"]
    assert len(set(digests)) == 4


def test_a_checkpoint_is_the_same_in_every_dtype_and_deferred_or_not(
    small_policy: CogACT, small_bfloat16_policy: CogACT, plan: Plan
) -> None:
    weights = small_policy.state_dict()
    stored = {name: weight.double() for name, weight in weights.items()}
    deferred = {name: DeferredWeight(weight, dtype=torch.float32) for name, weight in stored.items()}
    strided = {name: weight.T.contiguous().T if weight.ndim == 2 else weight for name, weight in weights.items()}
    backwards = dict(reversed(weights.items()))
    for found in (small_bfloat16_policy.state_dict(), deferred, strided, backwards):
        assert fingerprint_weights(found) == plan.checkpoint


def test_deferred_weights_are_not_computed(small_policy: CogACT, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: DeferredWeight(tensor, dtype=torch.bfloat16) for name, tensor in small_policy.state_dict().items()}
    monkeypatch.setattr(DeferredWeight, "compute", lambda _: pytest.fail("a whole weight was computed"))
    fingerprint_weights(weights)


def test_a_cut_weight_is_read_as_what_is_left() -> None:
    weight = torch.arange(40.0).view(10, 4)
    kept = torch.tensor([1, 7])
    assert fingerprint_weights({"a.b": cut(weight, 0, kept)}) == fingerprint_weights({"a.b": weight[kept]})


@pytest.mark.parametrize("place", [(0, 0), (999, 999), (333, 330)])
def test_a_large_tensor_is_told_by_its_ends_and_by_places_between(place: tuple[int, int]) -> None:
    weight = torch.ones(1000, 1000)
    before = fingerprint_weights({"a.b": weight})
    weight[place] = 2.0
    assert fingerprint_weights({"a.b": weight}) != before


def _negate(weights: dict[str, Tensor]) -> None:
    weights[NAME] = -weights[NAME]


def _rename(weights: dict[str, Tensor]) -> None:
    weights[f"{NAME}_g"] = weights.pop(NAME)


def _reshape(weights: dict[str, Tensor]) -> None:
    weights[NAME] = weights[NAME].reshape(-1, 2)


@pytest.mark.parametrize("change", [_negate, _rename, _reshape])
def test_a_plan_of_other_weights_is_refused_with_both_fingerprints(
    change: Callable[[dict[str, Tensor]], None], small_policy: CogACT, plan: Plan
) -> None:
    weights = dict(small_policy.state_dict())
    check_checkpoint(plan, weights)
    change(weights)
    there, here = (dict(found)["llm_backbone"] for found in (plan.checkpoint, fingerprint_weights(weights)))
    with pytest.raises(CalibrationError, match=f"another checkpoint.*: llm_backbone {there} there and {here} here; "):
        check_checkpoint(plan, weights)


def test_a_group_that_is_not_there_is_called_absent(small_policy: CogACT, plan: Plan) -> None:
    weights = {name: weight for name, weight in small_policy.state_dict().items() if not name.startswith("projector")}
    with pytest.raises(CalibrationError, match=r"projector [0-9a-f]{16} there and absent here"):
        check_checkpoint(plan, weights)


def test_a_plan_of_no_weights_fits_all_of_them(plan: Plan, small_policy: CogACT) -> None:
    unmeasured = Plan(decisions=(LayerDecision(keep=plan.keep_layers),))
    check_checkpoint(unmeasured, small_policy.state_dict())
    check_checkpoint(unmeasured, skeleton(small_policy.sizes).state_dict())


def test_a_policy_without_weights_is_not_taken_for_the_one_that_was_measured(plan: Plan, small_policy: CogACT) -> None:
    with pytest.raises(CalibrationError, match="is on the meta device, so the policy has no weights"):
        check_checkpoint(plan, skeleton(small_policy.sizes).state_dict())


def test_compile_refuses_a_plan_of_other_weights_before_it_captures(
    plan: Plan, small_policy: CogACT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "capture", lambda *_: pytest.fail("captured before the refusal"))
    other = deepcopy(small_policy)
    other.get_parameter(NAME).mul_(1.5)
    with pytest.raises(CalibrationError, match="the plan was measured on another checkpoint"):
        evla.compile(other, DENSE, plan=plan)


def test_the_backend_of_torch_compile_refuses_a_plan_of_other_weights(plan: Plan) -> None:
    captured = DynamoGraph(fx.GraphModule(nn.Module(), fx.Graph()), {NAME: 0}, ())
    compiled = _Compiled(captured, plan, [], "eager", 9)
    with pytest.raises(CalibrationError, match="the plan was measured on another checkpoint"):
        compiled.prepare([torch.zeros(2)])


def test_a_graph_without_guidance_has_the_fingerprint_of_its_policy(plan: Plan, small_policy: CogACT) -> None:
    weights = dict(small_policy.state_dict())
    del weights["action_model.net.z_embedder.uncondition"]
    check_checkpoint(plan, weights)

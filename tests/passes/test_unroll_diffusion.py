"""`UnrollDiffusion` against the policy's own sampler."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, fx

from evla_compile.errors import PassError
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT, NoisePrediction
from evla_compile.graph.contract import copy_graph, measure, weights
from evla_compile.graph.sites import indexed_modules, is_call
from evla_compile.passes import UnrollDiffusion
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.schedule import ddim_schedule, ddim_timesteps

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class LoopedPrediction(NoisePrediction):
    """Not one prediction but the sampler, written as a loop: what unrolling has to equal."""

    def forward(
        self, image: Tensor, input_ids: Tensor, text_length: Tensor, noise: Tensor, timestep: Tensor, cfg_scale: float
    ) -> Tensor:
        condition = self.cognition(image, input_ids, text_length)
        x = noise
        for step in ddim_schedule(3):
            predicted = self.action_model(x, torch.tensor([float(step.timestep)]), condition, cfg_scale)
            x = step.sample * x + step.noise * predicted
        return x


def operators(gm: fx.GraphModule) -> Counter[object]:
    return Counter(n.target for n in gm.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("steps", range(1, 11))
def test_the_guided_graph_equals_the_policys_sampler(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: Inputs, steps: int
) -> None:
    unrolled, report = UnrollDiffusion(ddim_steps=steps)(small_graph)
    assert torch.equal(unrolled(*small_inputs), small_policy.sample(*small_inputs, ddim_steps=steps, cfg_scale=1.5))
    assert (report.changes, report.exact) == (steps, True)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_unguided_graph_equals_the_policys_sampler(
    small_policy: CogACT, small_unguided_graph: fx.GraphModule, small_inputs: Inputs, steps: int
) -> None:
    unrolled, _ = UnrollDiffusion(ddim_steps=steps)(small_unguided_graph)
    assert torch.equal(unrolled(*small_inputs), small_policy.sample(*small_inputs, ddim_steps=steps, cfg_scale=1.0))


def test_it_has_the_operators_of_the_loop_less_two_copies_of_what_no_step_changes(
    small_policy: CogACT, small_graph: fx.GraphModule, small_config: CompileConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evla_compile.families.cogact.capture.NoisePrediction", LoopedPrediction)
    looped = capture(small_policy, small_config)
    unrolled, report = UnrollDiffusion(ddim_steps=3)(small_graph)
    invariant = {
        aten.linear.default: 2,  # both embedded conditions
        aten.slice.Tensor: 2,  # positional embeddings of the condition and of the actions
        aten.unsqueeze.default: 2,
        aten.arange.default: 1,  # frequencies of the timestep embedding
        aten.mul.Tensor: 1,
        aten.div.Tensor: 1,
        aten.exp.default: 1,
    }
    assert operators(looped) - operators(unrolled) == {operator: 2 * count for operator, count in invariant.items()}
    assert not operators(unrolled) - operators(looped)
    assert report.after.weight_bytes == measure(looped).weight_bytes == report.before.weight_bytes + 3 * 4


@pytest.mark.parametrize("steps", [1, 5])
def test_conditions_are_embedded_once_whatever_the_steps(small_graph: fx.GraphModule, steps: int) -> None:
    unrolled, _ = UnrollDiffusion(ddim_steps=steps)(small_graph)
    (weight,) = unrolled.graph.find_nodes(op="get_attr", target="action_model.net.z_embedder.linear.weight")
    assert [is_call(user, aten.linear.default) for user in weight.users] == [True, True]  # with and without condition


def test_each_step_has_its_timestep_and_its_module_path(small_graph: fx.GraphModule) -> None:
    unrolled, _ = UnrollDiffusion(ddim_steps=4)(small_graph)
    steps = indexed_modules(unrolled.graph, COGACT.denoising)
    assert list(steps) == [0, 1, 2, 3]
    tensors = dict(weights(unrolled))
    read = [
        {float(tensors[str(a.target)]) for n in nodes for a in n.all_input_nodes if "timestep" in str(a.target)}
        for nodes in steps.values()
    ]
    assert read == [{float(timestep)} for timestep in ddim_timesteps(4)]


def test_the_timestep_is_no_longer_an_input(small_sampler: fx.GraphModule) -> None:
    assert tuple(n.target for n in small_sampler.graph.find_nodes(op="placeholder")) == COGACT.input_names


def test_the_input_graph_is_untouched(
    small_graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_graph):
        UnrollDiffusion(ddim_steps=2)(small_graph)


def test_an_unrolled_graph_is_refused(small_sampler: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"no input 'timestep'; its inputs are \[.*'noise'.*\]"):
        UnrollDiffusion(ddim_steps=5)(small_sampler)


def test_a_graph_with_another_output_is_refused(small_graph: fx.GraphModule) -> None:
    other = copy_graph(small_graph)
    other.graph.output_node().args = (next(iter(other.graph.find_nodes(op="placeholder", target="noise"))),)
    with pytest.raises(PassError, match="output is not the action model's noise prediction"):
        UnrollDiffusion(ddim_steps=5)(other)


def test_a_step_count_without_a_stride_is_refused(small_graph: fx.GraphModule) -> None:
    with pytest.raises(ValueError, match=r"ddim_steps=11 .*valid: 1, 2, 3"):
        UnrollDiffusion(ddim_steps=11)(small_graph)

"""`UnrollSolver` against the solver's formulas, step by step, on the policy's own action head."""

import math
import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, fx

from evla_compile.errors import PassError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import copy_graph, measure, weights
from evla_compile.graph.sites import indexed_modules, module_path, nodes_under, stage_node
from evla_compile.passes import UnrollDiffusion, UnrollSolver
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.schedule import cumulative_alphas
from evla_compile.settings.tolerances import TOLERANCES, relative_error

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def sample_by_hand(policy: CogACT, inputs: Inputs, timesteps: tuple[int, ...], cfg_scale: float) -> list[Tensor]:
    """Return the noisy actions behind every step, by the formulas in float64: data predictions, and their slope."""
    *observation, start = inputs
    z, alphas = policy.cognition(*observation), cumulative_alphas()
    x, predictions, ratios, found = start.double(), [], [], []
    for place, timestep in enumerate(timesteps):
        a, s = math.sqrt(alphas[timestep]), math.sqrt(1 - alphas[timestep])
        noise = policy.action_model(x.float(), torch.tensor([float(timestep)]), z, cfg_scale).double()
        predictions.append((x - s * noise) / a)
        ratios.append(math.log(a / s))
        if place + 1 == len(timesteps):
            x = predictions[-1]  # at a noise of zero
        else:
            following = alphas[timesteps[place + 1]]
            a_next, s_next = math.sqrt(following), math.sqrt(1 - following)
            h = math.log(a_next / s_next) - ratios[-1]
            slope = torch.zeros_like(x)
            if place:
                slope = (predictions[-1] - predictions[-2]) / (ratios[-1] - ratios[-2])
            x = s_next / s * x + a_next * (1 - math.exp(-h)) * (predictions[-1] + slope * h / 2)
        found.append(x)
    return found


@pytest.mark.parametrize("timesteps", [(90,), (90, 45), (90, 45, 10), (99, 70, 50, 20, 5, 0)])
def test_it_equals_the_solver_by_hand(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: Inputs, timesteps: tuple[int, ...]
) -> None:
    unrolled, report = UnrollSolver(timesteps=timesteps)(small_graph)
    expected = sample_by_hand(small_policy, small_inputs, timesteps, 1.5)
    assert relative_error(unrolled(*small_inputs).numpy(), expected[-1].float().numpy()) <= TOLERANCES.samples
    assert (report.changes, report.exact) == (len(timesteps), False)


def test_every_step_equals_the_solver_by_hand_without_guidance(
    small_policy: CogACT,
    small_unguided_graph: fx.GraphModule,
    small_inputs: Inputs,
    node_values: Callable[..., dict[fx.Node, Tensor]],
) -> None:
    timesteps = (90, 70, 50, 30, 10)
    unrolled, _ = UnrollSolver(timesteps=timesteps)(small_unguided_graph)
    values = node_values(unrolled, small_inputs)
    for step, expected in enumerate(sample_by_hand(small_policy, small_inputs, timesteps, 1.0)):
        found = values[stage_node(unrolled.graph, f"denoising.{step}")]
        assert relative_error(found.numpy(), expected.float().numpy()) <= TOLERANCES.samples


def test_it_has_the_operators_of_ddim_and_those_of_the_second_order(small_graph: fx.GraphModule) -> None:
    """Of four steps the first three predict actions for the next, and the second and third take an earlier one."""
    solver, report = UnrollSolver(timesteps=(75, 50, 25, 0))(small_graph)
    ddim, ddim_report = UnrollDiffusion(ddim_steps=4)(small_graph)
    added = [
        Counter(n.target for n in nodes_under(solver.graph, f"{COGACT.denoising}.{step}"))
        - Counter(n.target for n in nodes_under(ddim.graph, f"{COGACT.denoising}.{step}"))
        for step in range(4)
    ]
    data = Counter({aten.mul.Tensor: 2, aten.add.Tensor: 1})
    term = Counter({aten.mul.Tensor: 1, aten.add.Tensor: 1})
    assert added == [data, data + term, term, Counter()]
    assert measure(solver).ops - measure(ddim).ops == sum(map(Counter.total, added))
    assert report.after.weight_bytes == ddim_report.after.weight_bytes


def test_each_step_has_its_timestep_and_its_module_path(small_graph: fx.GraphModule) -> None:
    unrolled, _ = UnrollSolver(timesteps=(90, 45, 10))(small_graph)
    tensors = dict(weights(unrolled))
    steps = indexed_modules(unrolled.graph, COGACT.denoising)
    read = [
        {float(tensors[str(a.target)]) for n in nodes for a in n.all_input_nodes if "timestep" in str(a.target)}
        for nodes in steps.values()
    ]
    assert (list(steps), read) == ([0, 1, 2], [{90.0}, {45.0}, {10.0}])
    assert all(module_path(node) for nodes in steps.values() for node in nodes)


def test_the_timestep_is_no_longer_an_input(small_graph: fx.GraphModule) -> None:
    unrolled, _ = UnrollSolver(timesteps=(90, 45))(small_graph)
    assert tuple(n.target for n in unrolled.graph.find_nodes(op="placeholder")) == COGACT.input_names


def test_the_input_graph_is_untouched(
    small_graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_graph):
        UnrollSolver(timesteps=(90, 45, 10))(small_graph)


def test_an_unrolled_graph_is_refused(small_sampler: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"no input 'timestep'; its inputs are \[.*'noise'.*\]"):
        UnrollSolver(timesteps=(90, 45))(small_sampler)


def test_a_graph_with_another_output_is_refused(small_graph: fx.GraphModule) -> None:
    other = copy_graph(small_graph)
    other.graph.output_node().args = (next(iter(other.graph.find_nodes(op="placeholder", target="noise"))),)
    with pytest.raises(PassError, match="output is not the action model's noise prediction"):
        UnrollSolver(timesteps=(90, 45))(other)


@pytest.mark.parametrize("timesteps", [(), (45, 90), (90, 90), (100, 50), (90, -1)])
def test_timesteps_that_do_not_descend_on_the_schedule_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"timesteps={timesteps}: expected descending timesteps")):
        UnrollSolver(timesteps=timesteps)

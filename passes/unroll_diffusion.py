"""Unroll the captured denoising step into the whole sampler."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, add_tensor, inserting
from evla_compile.graph.sites import argument, input_node, nodes_under
from evla_compile.settings.anatomy import COGACT, DENOISED, NOISE
from evla_compile.settings.schedule import ddim_schedule

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class UnrollDiffusion(GraphPass):
    """Copy the captured denoising step `ddim_steps` times with constant timesteps, exact: the DDIM sampler, eta 0.

    CogACT samples x <- A x + B eps(x, t), x float32 [B,A,F], both coefficients folded to constants (see
    `evla_compile.settings.schedule`); EfficientVLA section 3.4 caches features across these steps. What does not depend
    on the noisy actions or on the timestep is not copied: the cognition feature is embedded once, in front of them.
    Step k becomes the module path `denoising.k.…`. Refuses a graph without the `timestep` input, which is unrolled
    already.
    """

    exact: ClassVar[bool] = True

    ddim_steps: int
    """Denoising steps; a count that an integer stride over the training schedule yields."""

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Replace the noise prediction, the graph's output, by the samples."""
        graph = gm.graph
        noise, timestep, output = input_node(graph, NOISE), input_node(graph, "timestep"), graph.output_node()
        step_nodes = _loop_body(graph, {noise, timestep})
        predicted = argument(output, 0)
        if predicted not in step_nodes:
            raise PassError("the graph's output is not the action model's noise prediction")
        x = noise
        for number, step in enumerate(ddim_schedule(self.ddim_steps)):
            value = torch.tensor([float(step.timestep)], device=timestep.meta["val"].device)
            with graph.inserting_before(output):
                constant = graph.get_attr(add_tensor(gm, f"timestep_{step.timestep}", value))
            mapping = {noise: x, timestep: constant}
            _copy_step(graph, step_nodes, mapping, output, number)
            with inserting(graph, output, f"{COGACT.denoising}.{number}") as proxy:
                scaled = aten.mul.Tensor(proxy(x), step.sample)
                x = aten.add.Tensor(scaled, aten.mul.Tensor(proxy(mapping[predicted]), step.noise)).node
            x.meta["stage"] = f"{DENOISED}.{number}"
        output.args = (x,)
        for node in reversed(step_nodes):
            graph.erase_node(node)
        graph.erase_node(timestep)
        return self.ddim_steps


def _loop_body(graph: fx.Graph, varying: set[fx.Node]) -> list[fx.Node]:
    """Return the action model's nodes that depend on `varying`, in graph order; adds them to `varying`."""
    body = []
    for node in nodes_under(graph, COGACT.action_model):
        if varying.intersection(node.all_input_nodes):
            varying.add(node)
            body.append(node)
    return body


def _copy_step(
    graph: fx.Graph, body: list[fx.Node], mapping: dict[fx.Node, fx.Node], before: fx.Node, number: int
) -> None:
    """Copy `body` in front of `before`, with inputs replaced by `mapping`; adds the copies to `mapping`."""
    with graph.inserting_before(before):
        for node in body:
            copied = graph.node_copy(node, lambda read: mapping.get(read, read))
            copied.meta["nn_module_stack"] = {
                f"{COGACT.denoising}.{number}.{key}": (f"{COGACT.denoising}.{number}.{path}", kind)
                for key, (path, kind) in node.meta["nn_module_stack"].items()
                if path
            }
            mapping[node] = copied

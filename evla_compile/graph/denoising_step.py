"""The captured denoising step, which unrolling a sampler copies once for each step."""

import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import add_tensor
from evla_compile.graph.sites import argument, input_node, nodes_under
from evla_compile.settings.anatomy import COGACT, DENOISED, NOISE


class CapturedStep:
    """The part of a captured graph that depends on the noisy actions or on the timestep, to be copied.

    What depends on neither is not copied: the cognition feature is embedded once, in front of all steps.

    Attributes:
        noise: the noise from which the sampler starts, float32 [B,A,F].
        output: the graph's output node, in front of which steps are written.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        """Find the step.

        Raises:
            PassError: the graph has no input `timestep`, so it is unrolled already; or its output is no noise.
        """
        self._gm, graph = gm, gm.graph
        self.noise, self._timestep, self.output = (
            input_node(graph, NOISE),
            input_node(graph, "timestep"),
            graph.output_node(),
        )
        self._nodes = _loop_body(graph, {self.noise, self._timestep})
        self._predicted = argument(self.output, 0)
        if self._predicted not in self._nodes:
            raise PassError("the graph's output is not the action model's noise prediction")

    def copy(self, x: fx.Node, timestep: int, number: int) -> fx.Node:
        """Copy the step under the module path `denoising.<number>.…` and return the noise that it predicts.

        Args:
            x: the noisy actions that enter it, [B,A,F].
            timestep: index on the training schedule, a constant of the copy.
            number: of the step.
        """
        graph = self._gm.graph
        value = torch.tensor([float(timestep)], device=self._timestep.meta["val"].device)
        with graph.inserting_before(self.output):
            constant = graph.get_attr(add_tensor(self._gm, f"timestep_{timestep}", value))
        mapping = {self.noise: x, self._timestep: constant}
        _copy(graph, self._nodes, mapping, self.output, number)
        return mapping[self._predicted]

    def replace(self, samples: fx.Node) -> None:
        """Make `samples` the graph's output, and erase the step and its input `timestep`."""
        graph = self._gm.graph
        self.output.args = (samples,)
        for node in reversed(self._nodes):
            graph.erase_node(node)
        graph.erase_node(self._timestep)


def mark_denoised(x: fx.Node, number: int) -> None:
    """Name the actions that leave a step as the stage `denoising.<number>`."""
    x.meta["stage"] = f"{DENOISED}.{number}"


def _loop_body(graph: fx.Graph, varying: set[fx.Node]) -> list[fx.Node]:
    """Return the action model's nodes that depend on `varying`, in graph order; adds them to `varying`."""
    body = []
    for node in nodes_under(graph, COGACT.action_model):
        if varying.intersection(node.all_input_nodes):
            varying.add(node)
            body.append(node)
    return body


def _copy(graph: fx.Graph, body: list[fx.Node], mapping: dict[fx.Node, fx.Node], before: fx.Node, number: int) -> None:
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

"""Split a finished graph into a chain of smaller ones, for builders and devices with little memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from evla_compile.arguments import whole_number
from evla_compile.errors import ExportError
from evla_compile.graph.contract import copy_graph, get_tensor
from evla_compile.graph.sites import module_path
from evla_compile.settings.anatomy import COGACT, TEXT_LENGTH

ACTION, PERCEPTION, WHOLE = "action", "perception", "policy"
"""Names of parts; where perception has several, they are numbered from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One graph of a chain."""

    name: str
    """What it computes."""
    graph: fx.GraphModule
    """The graph; its inputs and outputs have the order of `inputs` and `outputs`."""
    inputs: tuple[str, ...]
    """Its inputs: inputs of the whole graph, and outputs of earlier pieces."""
    outputs: tuple[str, ...]
    """Its outputs: those of the whole graph first, then values that only later pieces read."""
    handed_on: frozenset[str] = frozenset()
    """Those of `outputs` that later pieces read."""


def split(gm: fx.GraphModule, outputs: Sequence[str], parts: int) -> tuple[Piece, ...]:
    """Return `gm` as a chain of `parts` graphs, which share its tensors and compute the very same operators.

    1. One part: the whole graph.
    2. Two parts: perception (vision, projector, decoder) and action (the denoising loop).
    3. More parts: action is the last, and perception is cut into runs of decoder layers with about equal weights,
       vision in the first. Each cut is in front of a decoder layer, so that the hidden states and small tensors are all
       that passes from one part to the next.

    Args:
        gm: a finished graph.
        outputs: names of its outputs, in order.
        parts: how many.

    Raises:
        ExportError: the graph has too few decoder layers for so many parts, or no action head.
        ValueError: `parts` is not a whole number from 1 up.
    """
    parts = whole_number("parts", parts, low=1)
    inputs = tuple(str(node.target) for node in gm.graph.find_nodes(op="placeholder"))
    if parts == 1:  # 1
        return (Piece(name=WHOLE, graph=gm, inputs=inputs, outputs=tuple(outputs)),)
    numbers = _assign(gm.graph, _regions(gm, parts))
    results = gm.graph.output_node().all_input_nodes
    named = dict(zip(results, outputs, strict=True))
    crossing = {
        node: named.get(node, node.name)
        for node in numbers
        if any(user in numbers and numbers[user] > numbers[node] for user in node.users)
    }
    labels = _labels(parts)
    return tuple(_piece(gm, labels[number], number, numbers, named, crossing) for number in range(parts))


def check_parts(parts: int, layers: int) -> None:
    """Refuse more parts than decoder layers and an action head can fill.

    Args:
        parts: how many are asked for.
        layers: decoder layers that are kept.

    Raises:
        ExportError: they are too many.
    """
    if parts > layers + 1:
        raise ExportError(
            f"parts={parts}: the policy keeps {layers} decoder layers, and a part has at least one of them or the"
            f" action head; expected at most {layers + 1} parts"
        )


def _labels(parts: int) -> list[str]:
    perception = [PERCEPTION] if parts == 2 else [f"{PERCEPTION}-{number}" for number in range(1, parts)]
    return [*perception, ACTION]


def _regions(gm: fx.GraphModule, parts: int) -> Mapping[str, int]:
    """Return the number of the part for each decoder layer and the action head, by module path (`ACTION` for it)."""
    sizes: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            tensor = get_tensor(gm, str(node.target))
            for user in node.users:
                path = _layer(module_path(user))
                sizes[path] = sizes.get(path, 0) + tensor.numel() * tensor.element_size()
    layers = [path for path in sizes if path.startswith(COGACT.decoder_layers)]
    if ACTION not in sizes:
        raise ExportError(f"parts={parts}: this graph has no action head to put into the last part; expected parts=1")
    check_parts(parts, len(layers))
    regions, number = {ACTION: parts - 1}, 0
    left, filled = sum(size for path, size in sizes.items() if path != ACTION), sizes.get("", 0)
    for position, path in enumerate(layers):
        wanted = parts - 1 - number  # parts still open, which share the remaining bytes equally
        begun = position > 0 and filled > 0
        if wanted > 1 and begun and (filled + sizes[path] / 2 > left / wanted or len(layers) - position < wanted):
            left, filled, number = left - filled, 0, number + 1
        regions[path] = number
        filled += sizes[path]
    return regions


def _layer(path: str) -> str:
    """Return the decoder layer that a module belongs to, or `ACTION`, or "" for what runs in front of the decoder."""
    if path.split(".", maxsplit=1)[0] in (COGACT.action_model, COGACT.denoising):
        return ACTION
    if path.startswith(f"{COGACT.decoder_layers}."):
        return f"{COGACT.decoder_layers}.{path.removeprefix(f'{COGACT.decoder_layers}.').split('.')[0]}"
    return ""


def _assign(graph: fx.Graph, regions: Mapping[str, int]) -> dict[fx.Node, int]:
    """Return the part of every operator: that of its module, or of the last operator that it reads."""
    numbers: dict[fx.Node, int] = {}
    free = list(graph.find_nodes(op="placeholder", target=TEXT_LENGTH))
    for node in graph.nodes:
        if node.op == "call_function":
            read = [numbers[source] for source in node.all_input_nodes if source in numbers]
            numbers[node] = max([regions.get(_layer(module_path(node)), 0), *read])
            if all(source in free or source.op == "get_attr" for source in node.all_input_nodes):
                free.append(node)
    for node in reversed(free[1:]):  # masks and positions are computed in the part that reads them, not passed to it
        behind = [numbers[user] for user in node.users if user in numbers]
        numbers[node] = min(behind, default=numbers[node])
    return numbers


def _piece(
    gm: fx.GraphModule,
    label: str,
    number: int,
    numbers: Mapping[fx.Node, int],
    named: Mapping[fx.Node, str],
    crossing: Mapping[fx.Node, str],
) -> Piece:
    """Return the piece of one part; `numbers` are the parts of all nodes, `crossing` the values read by later parts."""
    inside = [node for node in gm.graph.nodes if numbers.get(node) == number]
    read = dict.fromkeys(source for node in inside for source in node.all_input_nodes if numbers.get(source) != number)
    inputs = [node for node in gm.graph.nodes if node in read and node.op != "get_attr"]
    results = [node for node in named if numbers.get(node) == number]
    results += [node for node in inside if node in crossing and node not in named]
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        values[node] = graph.placeholder(node.name)
        values[node].meta = {"val": node.meta["val"]}
    for node in _with_tensors(gm.graph, inside):
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in results))
    return Piece(
        name=label,
        graph=copy_graph(fx.GraphModule(gm, graph)),
        inputs=tuple(crossing.get(node, str(node.target)) for node in inputs),
        outputs=tuple(named.get(node, node.name) for node in results),
        handed_on=frozenset(crossing[node] for node in inside if node in crossing),
    )


def _with_tensors(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return `nodes` and the tensors of the graph that they read, in graph order."""
    inside = set(nodes)
    return [
        node for node in graph.nodes if node in inside or (node.op == "get_attr" and not inside.isdisjoint(node.users))
    ]

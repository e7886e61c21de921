"""Run a captured graph stretch by stretch on batches of any size, so that each weight is read once for all of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from evla_compile.graph.contract import get_tensor
from evla_compile.graph.deferred import materialized
from evla_compile.graph.sites import is_call

aten = torch.ops.aten

Values: TypeAlias = dict[str, Any]
"""Values of a graph's nodes on one batch, by the nodes' names: tensors, and whole numbers where a node is a size."""

Watch: TypeAlias = Mapping[fx.Node, Callable[[Any], None]]
"""What is called with the value of a node when it is computed."""

WEIGHT_LIMIT = 256 * 2**20
"""Bytes of weights that a stretch holds at once, unless one operator alone reads more."""


class GraphWalk(fx.Interpreter):
    """Runs a graph up to chosen nodes, one stretch after the other, each on all batches before the next one.

    Between two stretches a batch is the values that later nodes still need. The batch size may differ from call to
    call, and from that of the capture: reshapes and expansions, the only operators that hold it, get that of the batch.

    Attributes:
        stretches: operator nodes of each stretch, in graph order.
    """

    def __init__(
        self, gm: fx.GraphModule, stops: Sequence[fx.Node], held: Mapping[fx.Node, fx.Node] | None = None
    ) -> None:
        """Divide the graph at `stops`, and further where the weights of a stretch exceed `WEIGHT_LIMIT`.

        Args:
            gm: the graph.
            stops: nodes, in graph order; what none of them needs is never run.
            held: nodes whose values are kept up to another node, although none that runs needs them.
        """
        super().__init__(gm)
        self._held = dict(held or {})
        nodes = list(gm.graph.nodes)
        self._place = {node: place for place, node in enumerate(nodes)}
        self._needed = _ancestors([*stops, *self._held])
        self._inputs = {str(node.target): node for node in gm.graph.find_nodes(op="placeholder")}
        self._weights = {n: get_tensor(gm, str(n.target)) for n in self._needed if n.op == "get_attr"}
        self._ends: list[fx.Node] = []
        self.stretches: list[list[fx.Node]] = []
        for stop in stops:
            first = self._place[self._ends[-1]] + 1 if self._ends else 0
            for stretch in self._divide(nodes[first : self._place[stop] + 1]):
                self.stretches.append(stretch)
                self._ends.append(stretch[-1])
        self._live = [self._live_behind(end) for end in self._ends]
        self._last_read = [self._read_last(*each) for each in zip(self.stretches, self._live, strict=True)]
        self._shaped = _batch_shaped(gm.graph)
        self._loaded: dict[fx.Node, Any] = {}
        self._batch = 0

    def count_to(self, stop: fx.Node) -> int:
        """Return how many stretches there are up to `stop`, one of the nodes that the graph is divided at."""
        return self._ends.index(stop) + 1

    def live(self, stop: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes whose values are kept behind `stop`."""
        return self._live[self._ends.index(stop)]

    @contextmanager
    def loaded(self, stretch: int) -> Iterator[None]:
        """Compute and hold the weights of a stretch; deferred ones are read here, once."""
        read = dict.fromkeys(a for node in self.stretches[stretch] for a in node.all_input_nodes if a.op == "get_attr")
        self._loaded = {node: materialized(self._weights[node]) for node in read}
        try:
            yield
        finally:
            self._loaded = {}

    def run_stretch(self, stretch: int, values: Values, batch: int, watch: Watch | None = None) -> Values:
        """Run a stretch, whose weights are loaded, on one batch; nodes that `values` has already are not run.

        Args:
            stretch: its number.
            values: what is needed so far: the graph's inputs at first, then what the previous stretch returned.
            batch: rows of the batch.
            watch: called with the values of nodes.

        Returns:
            The values that later stretches need.
        """
        names = {node.name: node for node in self._live[stretch - 1]} if stretch else self._inputs
        self.env = {names[name]: value for name, value in values.items()} | self._loaded
        self._batch = batch
        for node in self.stretches[stretch]:
            if node not in self.env:
                self.env[node] = self.run_node(node)
            if watch and node in watch:
                watch[node](self.env[node])
            for read in self._last_read[stretch][node]:
                self.env.pop(read, None)
        found = {node.name: self.env[node] for node in self._live[stretch]}
        self.env = {}
        return found

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a node's arguments; the batch size in a shape is that of the batch that runs."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n in self._shaped:
            args = (args[0], [self._batch, *args[1][1:]], *args[2:])
        return args, kwargs

    def _divide(self, nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
        """Yield the operator nodes that are needed, in runs whose weights stay within the limit."""
        stretch: list[fx.Node] = []
        held: set[fx.Node] = set()
        for node in nodes:
            if node not in self._needed or node.op != "call_function":
                continue
            more = {read for read in node.all_input_nodes if read.op == "get_attr"}
            if held and sum(self._weights[read].nbytes for read in held | more) > WEIGHT_LIMIT:
                yield stretch
                stretch, held = [], set()
            stretch.append(node)
            held |= more
        if stretch:
            yield stretch

    def _read_last(self, stretch: Sequence[fx.Node], live: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """Return, for every node of a stretch, the values that nothing behind it needs, so that they can be freed."""
        keepers: dict[fx.Node, list[fx.Node]] = {}
        for held, until in self._held.items():
            keepers.setdefault(until, []).append(held)
        last = {
            read: node for node in stretch for read in (node, *node.all_input_nodes, *keepers.get(node, ()))
        }  # a node that comes later replaces one before
        found: dict[fx.Node, list[fx.Node]] = {node: [] for node in stretch}
        for read, node in last.items():
            if read.op != "get_attr" and read not in live:
                found[node].append(read)
        return found

    def _live_behind(self, end: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes up to `end` that are needed behind it, itself included."""
        place = self._place[end]

        def is_live(node: fx.Node) -> bool:
            if node.op == "get_attr" or self._place[node] > place:
                return False
            if node is end or (node in self._held and self._place[self._held[node]] > place):
                return True
            return any(self._place[user] > place for user in node.users if user in self._needed)

        return tuple(node for node in self._place if node in self._needed and is_live(node))


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _batch_shaped(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose argument 1 is a shape that begins with the batch size.

    That is every expansion, since expanding what has one row changes no value, and every view of what depends on a
    tensor among the inputs; what depends on weights and sizes alone has no rows of a batch.
    """
    batched: set[fx.Node] = set()
    found = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            batched.add(node)
        elif node.op == "call_function" and not isinstance(node.meta["val"], int | torch.SymInt):
            if batched.intersection(node.all_input_nodes):
                batched.add(node)
            viewed = node in batched and is_call(node, aten.view.default, aten.reshape.default)
            if (viewed or is_call(node, aten.expand.default)) and _begins_with_its_batch(node):
                found.add(node)
    return found


def _begins_with_its_batch(node: fx.Node) -> bool:
    shape, value = node.args[1], node.meta["val"]
    return isinstance(shape, list | tuple) and isinstance(value, Tensor) and bool(shape[0] == value.shape[0])

"""The pass contract: what a pass may never do to its input, what it drops and what it reports."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from evla_compile.errors import PassError
from evla_compile.graph.contract import (
    GraphPass,
    GraphStats,
    add_tensor,
    copy_graph,
    get_tensor,
    inserting,
    measure,
    propagate,
    remove_dead_nodes,
    replace_tensor,
    weights,
)
from evla_compile.graph.sites import argument, input_node, is_call, mark_stage, module_path, stage_node

aten = torch.ops.aten


class Toy(nn.Module):
    """Two linear layers in a row; the second input is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5, bias=False)
        self.second = nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


@pytest.fixture
def toy() -> fx.GraphModule:
    exported = torch.export.export(Toy().requires_grad_(False), (torch.zeros(4, 3), torch.zeros(1)))
    gm = exported.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return copy_graph(gm)


def linears(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if is_call(n, aten.linear.default)]


@dataclass(frozen=True, kw_only=True)
class Vandalize(GraphPass):
    """Do to the graph whatever a rewrite may do."""

    exact: ClassVar[bool] = False
    scale: float

    def rewrite(self, gm: fx.GraphModule) -> int:
        first, second = linears(gm)
        replace_tensor(gm, "first.weight", torch.ones(5, 3))
        replace_tensor(gm, "second.weight", get_tensor(gm, "second.weight")[:1])
        second.meta.pop("val")
        with inserting(gm.graph, second, "new") as proxy:
            buffer = gm.graph.get_attr(add_tensor(gm, "scale", torch.tensor([self.scale])))
            scaled = mark_stage(aten.mul.Tensor(proxy(argument(second, 0)), proxy(buffer)), "scaled")
        second.args = (scaled.node, second.args[1])
        first.meta["nn_module_stack"] = {}
        gm.graph.erase_node(input_node(gm.graph, "unused"))
        return 5


@dataclass(frozen=True, kw_only=True)
class Bypass(GraphPass):
    """Let the output be the graph's input."""

    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        gm.graph.output_node().args = (input_node(gm.graph, "x"),)
        return 1


def test_a_pass_leaves_its_input_untouched_whatever_it_does(
    toy: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(toy):
        rewritten, _ = Vandalize(scale=2.0)(toy)
    (result,) = rewritten(torch.ones(4, 3))
    assert torch.equal(result, 2.0 * torch.full((4, 5), 3.0) @ get_tensor(toy, "second.weight")[:1].T)


def test_a_pass_brings_the_values_of_its_nodes_up_to_date(toy: fx.GraphModule) -> None:
    rewritten, _ = Vandalize(scale=2.0)(toy)
    assert linears(rewritten)[1].meta["val"].shape == (4, 1)
    assert stage_node(rewritten.graph, "scaled").meta["val"].shape == (4, 5)
    assert module_path(stage_node(rewritten.graph, "scaled")) == "new"


def test_a_pass_reports_sizes_and_changes_and_logs_one_line(
    toy: fx.GraphModule, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="evla_compile"):
        rewritten, report = Vandalize(scale=2.0)(toy)
    assert (report.name, report.exact, report.changes) == ("Vandalize(scale=2.0)", False, 5)
    products, relu, scale = 2 * 4 * (3 * 5 + 5 * 2), 4 * 5, 4 * 5
    assert report.before == GraphStats(
        ops=3, flops=products + relu, paper_flops=products, weight_bytes=4 * (3 * 5 + 5 * 2)
    )
    products = 2 * 4 * (3 * 5 + 5)
    assert report.after == GraphStats(
        ops=4, flops=products + relu + scale, paper_flops=products, weight_bytes=4 * (3 * 5 + 5 + 1)
    )
    assert report.after == measure(rewritten)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("evla_compile")]
    assert lines == ["Vandalize(scale=2.0): 5 changes, 3 -> 4 ops"]


def test_what_no_output_needs_goes_with_its_weights_and_inputs_stay(toy: fx.GraphModule) -> None:
    rewritten, report = Bypass()(toy)
    assert report.after == GraphStats(ops=0, flops=0, paper_flops=0, weight_bytes=0)
    assert not rewritten.state_dict()
    assert [n.target for n in rewritten.graph.nodes if n.op == "placeholder"] == ["x", "unused"]


def test_dead_fused_attention_is_removed() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            functional.scaled_dot_product_attention(x, x, x)
            return x + 1

    gm = torch.export.export(Attention(), (torch.zeros(1, 2, 3, 4),)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    assert any(is_call(n, aten.scaled_dot_product_attention.default) for n in gm.graph.nodes)
    remove_dead_nodes(gm.graph)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.add.Tensor]


def test_a_copy_shares_its_tensors_and_holds_no_others(toy: fx.GraphModule) -> None:
    toy.register_buffer("stray", torch.zeros(3))
    copied = copy_graph(toy)
    assert [(name, id(tensor)) for name, tensor in weights(copied)] == [(n, id(t)) for n, t in weights(toy)]
    assert sorted(copied.state_dict()) == ["first.weight", "second.weight"]


def test_a_replaced_tensor_leaves_copies_alone(toy: fx.GraphModule) -> None:
    copied, before = copy_graph(toy), get_tensor(toy, "first.weight")
    replace_tensor(copied, "first.weight", torch.zeros(5, 3))
    assert get_tensor(toy, "first.weight") is before
    assert before.any()
    assert not get_tensor(copied, "first.weight").any()


def test_held_tensors_get_free_names(toy: fx.GraphModule) -> None:
    names = [add_tensor(toy, "a.b", torch.tensor([float(i)])) for i in range(3)]
    assert len(set(names)) == 3
    assert [float(get_tensor(toy, name)) for name in names] == [0.0, 1.0, 2.0]


def test_a_tensor_under_two_names_is_weighed_once(toy: fx.GraphModule) -> None:
    output = toy.graph.output_node()
    with toy.graph.inserting_before(output):
        alias = toy.graph.get_attr(add_tensor(toy, "alias", get_tensor(toy, "first.weight")))
    output.args = ((linears(toy)[1], alias),)
    assert len(list(weights(toy))) == 3
    assert measure(toy).weight_bytes == 4 * (3 * 5 + 5 * 2)


def test_only_what_follows_from_a_changed_shape_is_computed_anew(toy: fx.GraphModule) -> None:
    first, second = linears(toy)
    kept, stale = first.meta["val"], second.meta["val"]
    with inserting(toy.graph, second, "new") as proxy:
        rows = aten.slice.Tensor(proxy(argument(second, 0)), 0, 0, 3)
    second.args = (rows.node, second.args[1])
    propagate(toy)
    assert first.meta["val"] is kept
    assert second.meta["val"] is not stale
    assert second.meta["val"].shape == (3, 2)


def test_a_node_whose_value_cannot_be_computed_is_refused(toy: fx.GraphModule) -> None:
    with toy.graph.inserting_before(toy.graph.output_node()):
        toy.graph.call_method("relu", (linears(toy)[1],))
    with pytest.raises(PassError, match="node relu_1: call_method has no value and none can be computed"):
        propagate(toy)


def test_new_nodes_stand_in_front_and_belong_to_the_given_module(toy: fx.GraphModule) -> None:
    first, second = linears(toy)
    before = {n: module_path(n) for n in toy.graph.nodes}
    with inserting(toy.graph, second, "outer.inner") as proxy:
        total = aten.sum.default(proxy(first) + 1)
    added = [n for n in toy.graph.nodes if n not in before]
    assert [module_path(n) for n in added] == ["outer.inner"] * 2
    assert added[-1] is total.node is second.prev
    assert all(module_path(n) == path for n, path in before.items())

"""The loop of passes: their order, their reports, and an error that says where it happened."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, PassReport
from evla_compile.graph.run_passes import run_passes

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Append(GraphPass):
    """Put one more operator behind the others."""

    exact: ClassVar[bool] = False

    target: str

    def rewrite(self, gm: fx.GraphModule) -> int:
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            output.args = (gm.graph.call_function(getattr(aten, self.target).default, output.args),)
        return 1


@dataclass(frozen=True, kw_only=True)
class Refuse(GraphPass):
    """Never find a site."""

    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        raise PassError("there is no such layer")


@pytest.fixture
def identity() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    with FakeTensorMode():
        x.meta["val"] = torch.zeros(3)
    graph.output(x)
    return fx.GraphModule(torch.nn.Module(), graph)


def operators(gm: fx.GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_passes_run_in_their_order_and_their_reports_are_kept(identity: fx.GraphModule) -> None:
    graph, reports = run_passes(identity, (Append(target="neg"), Append(target="sin")))
    assert operators(graph) == [aten.neg.default, aten.sin.default]
    assert operators(identity) == []
    assert [report.name for report in reports] == ["Append(target='neg')", "Append(target='sin')"]
    assert [(report.before.ops, report.after.ops) for report in reports] == [(0, 1), (1, 2)]
    following, whole = run_passes(graph, (Append(target="cos"),), earlier=reports)
    assert operators(following)[2:] == [aten.cos.default]
    assert whole[:2] == reports
    assert len(whole) == 3


def test_without_passes_the_graph_stays_as_it_is(identity: fx.GraphModule) -> None:
    assert run_passes(identity, ()) == (identity, ())


def reports_of(identity: fx.GraphModule, *targets: str) -> tuple[PassReport, ...]:
    return run_passes(identity, [Append(target=target) for target in targets])[1]


def test_a_failure_names_the_pass_and_those_that_ran_before_it(identity: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"^Refuse: there is no such layer \(passes before it: Append, Append\)$"):
        run_passes(
            identity, (Append(target="sin"), Refuse(), Append(target="neg")), earlier=reports_of(identity, "cos")
        )
    with pytest.raises(PassError, match=r"^Refuse: there is no such layer \(passes before it: none\)$"):
        run_passes(identity, (Refuse(), Append(target="neg")))

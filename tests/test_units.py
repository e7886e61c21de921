"""Numbers with units: small values never look like zero, large ones keep their places."""

import io

import pytest
from rich.console import Console

from evla_compile.cli.demo import latency_table
from evla_compile.cli.estimate import estimate_summary
from evla_compile.compiler.report import CompileReport
from evla_compile.demo.demo import Latency
from evla_compile.estimate.estimates import Estimate
from evla_compile.estimate.footprint import Footprint
from evla_compile.graph.contract import GraphStats, PassReport
from evla_compile.settings.config import CompileConfig
from evla_compile.units import byte_scale, bytes_text, digits, flop_scale, time_scale


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.0000214, "2.14e-05"),
        (0.00214, "0.00214"),
        (0.0199, "0.0199"),
        (1, "1.00"),
        (15.44, "15.4"),
        (99.96, "100.0"),
        (420.7, "421"),
        (4248.3, "4,248"),
        (-0.5, "-0.500"),
    ],
)
def test_three_significant_digits(value: float, shown: str) -> None:
    assert digits(value) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_304, "98.3 kB"), (19_000_000, "19.0 MB"), (3e13, "30,000.0 GB")],
)
def test_bytes_take_the_unit_that_suits_them(count: float, shown: str) -> None:
    assert bytes_text(count) == shown


def test_a_column_has_the_unit_of_its_largest_value() -> None:
    weights, work, times = byte_scale((1, 2500)), flop_scale((4e12, 1e3)), time_scale((2e-3, 7e-6))
    assert (weights.unit, weights.show(2500), weights.show(1)) == ("kB", "2.50", "0.00100")
    assert (work.unit, work.show(4e12)) == ("GFLOP", "4,000")
    assert (times.unit, times.show(7e-6)) == ("ms", "0.00700")
    assert (time_scale((7e-6,)).unit, time_scale((7e-10,)).unit, time_scale((3.0,)).unit) == ("us", "ns", "ms")
    assert (byte_scale(()).unit, flop_scale((0,)).unit, time_scale((0.0,)).unit) == ("B", "FLOP", "ms")


def test_the_tables_of_a_small_policy_hold_no_zero() -> None:
    part = Footprint(ops=1, flops=40_000, paper_flops=30_000, parameters=900, weight_bytes=3600, read_bytes=3600)
    small = Estimate(dtype="float32", vision=part, language=part, action=part)
    stats = GraphStats(ops=3, flops=40_000, paper_flops=30_000, weight_bytes=3600)
    passes = (PassReport(name="FoldConstants", exact=True, changes=0, before=stats, after=stats),)
    report = CompileReport(config=CompileConfig(), passes=passes, deviations=())
    latency = latency_table([Latency(name="ONNX", median=0.004, p95=0.005)], {"ONNX": 3600})
    out = io.StringIO()
    console = Console(file=out, width=80)
    console.print(estimate_summary({"upstream": small, "dense": small}, CompileConfig.dense()), latency)
    text = out.getvalue() + str(report)
    for unit in ("weights kB", "kFLOP", "kFLOP (paper)", "Roofline, ns", "ONNX file kB", "median us"):
        assert unit in text
    cells = set(text.replace(",", " ").split())
    assert not cells & {"0", "0.0", "0.00", "0.000"} - {"0"}
    assert {"120", "10.8", "3.60", "40.0", "4.00"} <= cells

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.latency import backends, compare, timing
from benchmarks.latency import variants as latency_variants
from benchmarks.latency.backends import Backend, TimedCall, check_backends, draw_inputs, make_sampler
from benchmarks.latency.components import Cost, bound_seconds, costs_of, upstream_costs
from benchmarks.latency.policies import PolicyMaker, PreparedRow, random_weight
from benchmarks.latency.report import COLUMNS, Entry, to_markdown
from benchmarks.latency.rows import MID_SIZES, SIZES, Row, make_rows, select_rows
from benchmarks.latency.timing import Latency, Stopwatch, measure, summarize
from benchmarks.latency.variants import prepare_row
from evla_compile.errors import EvlaError, VerificationError
from evla_compile.estimate.devices import DEVICES, Device
from evla_compile.estimate.estimates import quick_estimates
from evla_compile.graph.contract import weights
from evla_compile.graph.flops import Component, graph_flops
from evla_compile.host.inputs import GraphInputs
from evla_compile.settings.config import PAPER_TEXT_TOKENS, CompileConfig
from evla_compile.settings.sizes import ModelSizes
from evla_compile.settings.tolerances import TOLERANCES, relative_error

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
ROOF = replace(DEVICES["h200"], bandwidth=1e9, float32_flops=1e9, bfloat16_flops=1e10)


@pytest.fixture(scope="module")
def sizes(small_sizes: ModelSizes) -> ModelSizes:
    """Small sizes with CogACT's vocabulary, which the ids of prompts need."""
    return replace(small_sizes, language=replace(small_sizes.language, vocabulary=32064))


@pytest.fixture(scope="module")
def rows(sizes: ModelSizes) -> dict[str, Row]:
    return {name: row for row in make_rows(sizes, dtype="float32", device="cpu") for name in row.names}


@pytest.fixture(scope="module")
def maker(sizes: ModelSizes) -> PolicyMaker:
    return PolicyMaker(sizes, device=CPU, seed=0)


@pytest.fixture(scope="module")
def dense(maker: PolicyMaker, rows: dict[str, Row]) -> PreparedRow:
    return maker.make(rows["dense"])


@pytest.fixture(scope="module")
def sampler_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TimedCall]:
    folder = tmp_path_factory.mktemp("samplers")

    def make(prepared: PreparedRow, backend: Backend = "eager", device: torch.device = CPU) -> TimedCall:
        return make_sampler(backend, prepared, device=device, compile_mode="default", threads=1, folder=folder)

    return make


@pytest.fixture(scope="module")
def settings(sizes: ModelSizes, rows: dict[str, Row], tmp_path_factory: pytest.TempPathFactory) -> compare.Settings:
    return compare.Settings(
        name="tiny",
        sizes=sizes,
        checkpoint=None,
        device=CPU,
        dtype="float32",
        rows=(rows["upstream-float32"], rows["dense"]),
        backends=("eager", "onnx-cpu"),
        compile_mode="default",
        warmup=1,
        runs=3,
        threads=1,
        seed=0,
        out=tmp_path_factory.mktemp("results") / "new",
        command="python -m benchmarks.latency --size tiny",
    )


@pytest.fixture(scope="module")
def written(settings: compare.Settings) -> tuple[Path, ...]:
    """A whole run, whose roof is given instead of measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "find_roof", lambda _: ROOF)
        return compare.run(settings)


def entry(median: float = 2.0, *, backend: str = "eager", modules: tuple[float, ...] = ()) -> Entry:
    return Entry(
        row="dense",
        backend=backend,
        latency=Latency(median=median, p95=3.0, p99=4.0, modules=modules, calls=(median,)),
        costs={"language": Cost(flops=6 * 10**9, read_bytes=10**9), "action": Cost(flops=10**9, read_bytes=5 * 10**8)},
        weight_bytes=2 * 10**9,
        bound_seconds=1e-3,
        peak_bytes=None,
        error=None,
    )


def cells(markdown: str) -> list[dict[str, str]]:
    """Return a Markdown table's rows by column."""
    table = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]]


def test_summary_is_the_percentiles_of_the_calls_and_the_medians_of_their_modules() -> None:
    found = summarize([*map(float, range(1, 101))], [(1.0, 10.0)] * 60 + [(3.0, 20.0)] * 40)
    assert found.median == pytest.approx(50.5)
    assert found.p95 == pytest.approx(95.05)
    assert found.p99 == pytest.approx(99.01)
    assert found.modules == (1.0, 10.0)
    assert found.calls[-1] == 100.0


def test_summary_of_calls_that_mark_nothing_has_no_modules() -> None:
    assert summarize([1.0, 2.0], [(), ()]).modules == ()


def test_stopwatch_measures_between_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "perf_counter", iter([1.0, 1.5, 3.5]).__next__)
    stopwatch = Stopwatch(CPU)
    for _ in range(3):
        stopwatch.mark()
    assert stopwatch.intervals() == (500.0, 2000.0)


def test_calls_take_turns_and_the_first_rounds_do_not_count() -> None:
    called: list[str] = []
    steps: list[None] = []
    found = measure(
        [lambda _: called.append("a"), lambda _: called.append("b")],
        CPU,
        warmup=2,
        runs=3,
        step=lambda: steps.append(None),
    )
    assert "".join(called) == "ababababab"
    assert [len(compare.calls) for compare in found] == [3, 3]
    assert len(steps) == 5


@pytest.mark.parametrize(("warmup", "runs"), [(-1, 1), (0, 0)])
def test_measuring_no_rounds_is_refused(warmup: int, runs: int) -> None:
    with pytest.raises(ValueError, match="expected at least 0 and 1"):
        measure([], CPU, warmup=warmup, runs=runs, step=lambda: None)


def test_rows_of_a_published_size_are_the_papers_and_our_presets() -> None:
    found = {row.names[0]: row for row in make_rows(SIZES["base"], dtype="bfloat16", device="cuda")}
    assert list(found) == [
        *("upstream-float32", "upstream-bfloat16", "dense", "layers-28", "layers-22", "mlp-0.75", "tokens-112"),
        *("tokens-56", "cache-5", "ex3", "ex4", "ex5", "ex6", "l28-t112", "l28-t56", "l22-t112", "l22-t56"),
        *("faithful", "balanced", "fast"),
    ]
    assert found["dense"].config == CompileConfig.dense(text_tokens=PAPER_TEXT_TOKENS)
    for name in ("l28-t112", "l28-t56", "l22-t112", "l22-t56", "faithful", "balanced", "fast"):
        preset = replace(CompileConfig.preset(name), text_tokens=PAPER_TEXT_TOKENS)
        config = found[name].config
        assert config is not None
        assert config.resolve(SIZES["base"]) == preset.resolve(SIZES["base"])
    assert [name for row in found.values() for name in row.names if name.startswith("ex")] == [
        *("ex1", "ex2", "ex3", "ex4", "ex5", "ex6", "ex7")
    ]


@pytest.mark.parametrize(
    ("name", "budgets"),
    [
        ("ex1", (None, 1.0, 56, 1)),
        ("ex2", (None, 1.0, None, 5)),
        ("ex3", (22, 1.0, 56, 1)),
        ("ex4", (22, 0.75, None, 1)),
        ("ex5", (22, 0.75, None, 5)),
        ("ex6", (None, 1.0, 56, 5)),
        ("ex7", (22, 0.75, 56, 5)),
    ],
)
def test_ablation_rows_cut_what_table_5_cuts(name: str, budgets: tuple[object, ...]) -> None:
    (row,) = select_rows(make_rows(SIZES["base"], dtype="bfloat16", device="cuda"), [name])
    config = row.config
    assert config is not None
    assert (config.keep_layers, config.mlp_keep, config.visual_tokens, config.cache_interval) == budgets


def test_budgets_scale_with_the_policy() -> None:
    names = [name for row in make_rows(MID_SIZES, dtype="float32", device="cpu") for name in row.names]
    assert {"layers-14", "layers-11", "tokens-56", "l11-t56"} <= set(names)


@pytest.mark.parametrize(
    ("device", "dtype", "weights", "computes_in"),
    [
        ("cpu", "float32", ["float32"], "float32"),
        ("cpu", "bfloat16", ["float32"], "float32"),
        ("cuda", "float32", ["float32"], "bfloat16"),
        ("cuda", "bfloat16", ["float32", "bfloat16"], "bfloat16"),
    ],
)
def test_upstream_runs_as_its_options_allow(device: str, dtype: Any, weights: list[str], computes_in: str) -> None:
    upstream = select_rows(make_rows(MID_SIZES, dtype=dtype, device=device), ["upstream"])
    assert [row.dtype for row in upstream] == weights
    assert {row.computes_in for row in upstream} == {computes_in}


def test_rows_are_selected_by_name_alias_and_group_in_table_order() -> None:
    every = make_rows(SIZES["base"], dtype="float32", device="cpu")
    found = select_rows(every, ["l22-t56", "ex2", "upstream", "l22-t56"])
    assert [row.label for row in found] == ["upstream-float32", "cache-5 (ex2)", "l22-t56 (ex7)"]
    assert len(select_rows(every, ["ablation"])) == 7
    assert len(select_rows(every, ["passes"])) == 6
    assert len(select_rows(every, ["presets"])) == 4
    assert select_rows(every, ["all"]) == every


@pytest.mark.parametrize("wanted", [["l22-t57"], []])
def test_unknown_rows_are_refused_with_the_known_ones(wanted: list[str]) -> None:
    with pytest.raises(ValueError, match=r"groups among upstream, dense, passes.*names among.*l22-t56"):
        select_rows(make_rows(SIZES["base"], dtype="float32", device="cpu"), wanted)


def test_mid_size_has_the_shares_of_cogact_base() -> None:
    config = CompileConfig.dense(text_tokens=PAPER_TEXT_TOKENS)
    shares = {}
    for name in ("base", "mid"):
        found = quick_estimates(SIZES[name], {"dense": config}, dtype=torch.float32)["dense"]
        flops = {component: found.components[component].flops for component in found.components}
        shares[name] = {component: count / sum(flops.values()) for component, count in flops.items()}
    assert shares["mid"] == pytest.approx(shares["base"], abs=0.005)


def test_modules_one_after_the_other_are_the_graph(
    maker: PolicyMaker, rows: dict[str, Row], sampler_of: Callable[..., TimedCall]
) -> None:
    prepared = maker.make(rows["ex7"])
    assert not isinstance(prepared.policy, torch.nn.Module)
    inputs, stopwatch = draw_inputs(maker.sizes, 1), Stopwatch(CPU)
    assert np.array_equal(sampler_of(prepared)(inputs, stopwatch), prepared.policy.sample(*inputs.arrays))
    assert len(stopwatch.intervals()) == 3
    assert sum(cost.flops for cost in prepared.costs.values()) == graph_flops(prepared.policy.graph.graph.nodes)


def test_a_module_reads_its_own_weights_and_no_embedding_table(dense: PreparedRow) -> None:
    costs, sizes = dense.costs, MID_SIZES.language.vocabulary * 32 * 4
    assert sum(cost.read_bytes for cost in costs.values()) == dense.weight_bytes - sizes
    assert costs_of(dense.components) == costs
    assert all(cost.read_bytes > 0 for cost in costs.values())


def test_upstream_runs_more_than_the_dense_policy_and_reads_more(dense: PreparedRow, sizes: ModelSizes) -> None:
    upstream = upstream_costs(sizes, "float32")
    for component, cost in dense.costs.items():
        assert upstream[component].flops > cost.flops, component
    head = 2 * (PAPER_TEXT_TOKENS + sizes.patches) * sizes.language.width * sizes.language.vocabulary
    assert upstream["language"].flops - dense.costs["language"].flops >= head


def test_bfloat16_halves_upstreams_weights_but_the_action_heads(sizes: ModelSizes) -> None:
    wide, narrow = upstream_costs(sizes, "float32"), upstream_costs(sizes, "bfloat16")
    assert narrow["vision"].read_bytes * 2 == wide["vision"].read_bytes
    assert narrow["language"].read_bytes * 2 == wide["language"].read_bytes
    assert narrow["action"] == wide["action"]


def test_bound_adds_up_the_modules_with_the_action_head_in_float32() -> None:
    costs: dict[Component, Cost] = {
        "vision": Cost(flops=10**10, read_bytes=10**8),  # 1 s of bfloat16 arithmetic
        "language": Cost(flops=10**9, read_bytes=2 * 10**9),  # 2 s of reading
        "action": Cost(flops=3 * 10**9, read_bytes=10**9),  # 3 s of float32 arithmetic
    }
    assert bound_seconds(costs, ROOF, "bfloat16") == pytest.approx(6.0)


def test_random_weights_depend_on_name_and_seed_and_keep_activations_sane() -> None:
    def draw(name: str, seed: int = 0, shape: tuple[int, ...] = (256, 512)) -> torch.Tensor:
        return random_weight(name, torch.Size(shape), seed=seed, device=CPU)

    first = draw("group.fc.weight")
    assert torch.equal(first, draw("group.fc.weight"))
    assert not torch.equal(first, draw("group.fc.weight", seed=1))
    assert not torch.equal(first, draw("group.fd.weight"))
    assert (torch.randn(64, 512) @ first.T).std() == pytest.approx(1.0, abs=0.1)
    assert draw("group.norm.weight", shape=(512,)).mean() == pytest.approx(1.0, abs=0.05)
    assert draw("group.fc.bias", shape=(512,)).std() == pytest.approx(0.02, abs=0.005)


def test_rows_share_their_weights(maker: PolicyMaker, dense: PreparedRow, rows: dict[str, Row]) -> None:
    assert not isinstance(dense.policy, torch.nn.Module)
    upstream = maker.make(rows["upstream-float32"]).policy
    assert isinstance(upstream, torch.nn.Module)
    theirs = upstream.state_dict()
    shared = [name for name, tensor in weights(dense.policy.graph) if name in theirs]
    assert len(shared) > 20
    for name, tensor in weights(dense.policy.graph):
        assert name not in theirs or tensor.data_ptr() == theirs[name].data_ptr(), name


def test_weights_of_a_checkpoint_are_used(maker: PolicyMaker, sizes: ModelSizes, rows: dict[str, Row]) -> None:
    upstream = maker.make(rows["upstream-float32"]).policy
    assert isinstance(upstream, torch.nn.Module)
    official = {name: tensor + 1 for name, tensor in upstream.state_dict().items()}
    loaded = PolicyMaker(sizes, device=CPU, seed=0, checkpoint=official).make(rows["upstream-float32"]).policy
    assert isinstance(loaded, torch.nn.Module)
    assert all(torch.equal(tensor, official[name]) for name, tensor in loaded.state_dict().items())


def test_upstream_and_the_dense_row_compute_the_same_policy(
    maker: PolicyMaker, dense: PreparedRow, rows: dict[str, Row], sampler_of: Callable[..., TimedCall]
) -> None:
    inputs, stopwatch = draw_inputs(maker.sizes, 5), Stopwatch(CPU)
    upstream = sampler_of(maker.make(rows["upstream-float32"]))
    first = upstream(inputs, Stopwatch(CPU))
    again = upstream(inputs, stopwatch)  # hooks mark every call alike
    assert len(stopwatch.intervals()) == 3
    assert np.array_equal(first, again)
    assert relative_error(sampler_of(dense)(inputs, Stopwatch(CPU)), again) < TOLERANCES.samples


def test_upstream_runs_eagerly_alone(
    maker: PolicyMaker, rows: dict[str, Row], sampler_of: Callable[..., TimedCall], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="upstream-float32 on onnx-cpu"):
        sampler_of(maker.make(rows["upstream-float32"]), "onnx-cpu")
    inputs = [draw_inputs(maker.sizes, 0)]
    settings = {"compile_mode": "default", "threads": 1, "folder": tmp_path}
    variants = prepare_row(rows["upstream-float32"], maker, ["onnx-cpu"], inputs, **settings)  # type: ignore[arg-type]
    assert [variant.backend for variant in variants] == ["eager"]


@pytest.mark.parametrize("broken", ["first call's result", "slightly off"])
def test_a_backend_that_returns_something_else_is_refused(
    broken: str, maker: PolicyMaker, rows: dict[str, Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered: list[NDArray[np.float32]] = []

    def wrong(backend: Backend, prepared: PreparedRow, **settings: Any) -> TimedCall:
        right = make_sampler("eager", prepared, **settings)

        def sample(inputs: GraphInputs, stopwatch: Stopwatch) -> NDArray[np.float32]:
            found = right(inputs, stopwatch)
            if backend == "eager":
                return found
            remembered.append(found)
            return remembered[0] if broken == "first call's result" else found * np.float32(1.001)

        return sample

    monkeypatch.setattr(latency_variants, "make_sampler", wrong)
    inputs = [draw_inputs(maker.sizes, seed) for seed in (0, 1)]
    with pytest.raises(VerificationError, match="dense on compile, samples against its eager run"):
        list(prepare_row(rows["dense"], maker, ["compile"], inputs, compile_mode="default", threads=1, folder=tmp_path))


def test_tolerance_is_that_of_the_arithmetic() -> None:
    assert latency_variants.tolerance("float32") == TOLERANCES.lowered
    assert latency_variants.tolerance("bfloat16") == latency_variants.BFLOAT16_TOLERANCE


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "message"),
    [
        ("cudagraphs", CPU, "float32", "backend cudagraphs: needs a GPU.*--device cuda"),
        ("compile-cudagraphs", CPU, "float32", "backend compile-cudagraphs: needs a GPU"),
        ("onnx-cpu", CPU, "bfloat16", "only float32 policies are exported.*--dtype float32"),
        ("onnx-cpu", CUDA, "float32", "run it with --device cpu"),
        ("onnx-cuda", CPU, "float32", "run it with --device cuda"),
    ],
)
def test_backends_that_do_not_fit_the_device_are_refused(
    backend: Backend, device: torch.device, dtype: Any, message: str
) -> None:
    with pytest.raises(EvlaError, match=message):
        check_backends([backend], device, dtype)


def test_missing_tools_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    providers = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(backends, "import_module", lambda _: providers)
    with pytest.raises(EvlaError, match=r"offers CPUExecutionProvider alone.*evla-compile\[gpu\]"):
        check_backends(["onnx-cuda"], CUDA, "float32")
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    with pytest.raises(EvlaError, match=r"ONNX Runtime is not installed: pip install \"evla-compile\[cpu\]\""):
        check_backends(["onnx-cpu"], CPU, "float32")
    with pytest.raises(EvlaError, match="pip install triton"):
        check_backends(["compile"], CUDA, "bfloat16")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(EvlaError, match="apt install g"):
        check_backends(["compile"], CPU, "float32")


def test_backends_that_are_there_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    check_backends(["eager", "compile", "onnx-cpu"], CPU, "float32")


def test_backends_are_checked_before_anything_is_made(settings: compare.Settings, tmp_path: Path) -> None:
    refused = replace(settings, backends=("cudagraphs",), out=tmp_path / "results")
    with pytest.raises(EvlaError, match="needs a GPU"):
        compare.run(refused)
    assert not refused.out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rows l22-t57", "rows \\['l22-t57'\\]"),
        ("--runs 0", "--runs and --threads from 1 up"),
        ("--threads 0", "--runs and --threads from 1 up"),
        ("--warmup -1", "--warmup from 0 up"),
        ("--checkpoint /nowhere/at/all", "/nowhere/at/all"),
        ("--backends cudagraphs", "needs a GPU"),
    ],
)
def test_a_wrong_command_line_ends_with_a_line(arguments: str, message: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        compare.main(["--device", "cpu", *arguments.split()])


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda: this torch sees no GPU"):
        compare.main(["--device", "cuda"])


def test_defaults_on_a_cpu_are_float32_eager_and_onnx() -> None:
    found = compare.parse(["--device", "cpu", "--size", "demo"])
    assert (found.dtype, found.backends, found.name) == ("float32", ("eager", "onnx-cpu"), "demo")
    assert [row.label for row in found.rows] == [
        *("upstream-float32", "dense", "l10-t112", "l10-t56", "l8-t112", "l8-t56 (ex7)")
    ]
    assert found.command == "python -m benchmarks.latency --device cpu --size demo"


def test_a_run_writes_its_table_numbers_and_plot(written: tuple[Path, ...], settings: compare.Settings) -> None:
    assert [file.name for file in written] == [f"latency-tiny-cpu-float32.{end}" for end in ("md", "json", "png")]
    numbers = json.loads(written[1].read_text(encoding="utf-8"))
    assert [(entry["row"], entry["backend"]) for entry in numbers["entries"]] == [
        ("upstream-float32", "eager"),
        ("dense", "eager"),
        ("dense", "onnx-cpu"),
    ]
    for found in numbers["entries"]:
        assert len(found["latency"]["calls"]) == settings.runs
        assert len(found["latency"]["modules"]) == (0 if found["backend"] == "onnx-cpu" else 3)
        assert found["peak_bytes"] is None
    assert numbers["entries"][0]["speed_up"] == 1.0
    assert numbers["entries"][1]["error"] is None
    assert 0 < numbers["entries"][2]["error"] < TOLERANCES.lowered
    assert numbers["roof"]["name"] == ROOF.name
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_the_table_says_under_what_conditions(written: tuple[Path, ...], settings: compare.Settings) -> None:
    markdown = written[0].read_text(encoding="utf-8")
    assert f"- command: `{settings.command}`" in markdown
    assert "- calls: 3 of each in turn, after 1 rounds to warm up" in markdown
    for condition in ("date", "processor", "host", "clocks before and after", "versions", "a call", "modules", "bound"):
        assert f"\n- {condition}: " in markdown
    assert "seed 0; stand-in plans" in markdown
    assert [row["policy"] for row in cells(markdown)] == ["upstream-float32", "dense", "dense"]


def test_the_table_derives_rates_bound_and_speed_up() -> None:
    slow, fast = entry(4.0, modules=(0.5, 1.0, 2.0)), entry(2.0, backend="onnx-cpu")
    first, second = cells(to_markdown([slow, replace(fast, error=2e-6, peak_bytes=10**9)], {}, ROOF, "title"))
    assert tuple(first) == COLUMNS
    assert (first["vision ms"], first["language ms"], first["action ms"]) == ("0.50", "1.00", "2.00")
    assert (second["vision ms"], second["error"], second["peak GB"]) == ("-", "2.0e-06", "1.00")
    assert (first["error"], first["peak GB"]) == ("-", "-")
    assert (second["GFLOP"], second["weights GB"], second["TFLOP/s"], second["GB/s"]) == ("7.0", "2.000", "3.5", "750")
    assert (second["bound ms"], second["x bound"]) == ("1.00", "2.00")
    assert (first["speed-up"], second["speed-up"]) == ("1.00x", "2.00x")


def test_a_measured_roof_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PRODUCT_SIDE", dict.fromkeys(timing._PRODUCT_SIDE, 64))
    monkeypatch.setattr(timing, "_STREAM_FLOATS", 4096)
    roof: Device = timing.find_roof(CPU)
    assert roof.source.startswith("measured in this run")
    assert min(roof.bandwidth, roof.float32_flops, roof.bfloat16_flops) > 1e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["cudagraphs", "compile", "compile-cudagraphs"])
def test_gpu_backends_return_what_the_eager_graph_does(sizes: ModelSizes, backend: Backend, tmp_path: Path) -> None:
    maker = PolicyMaker(sizes, device=CUDA, seed=0)
    (row,) = select_rows(make_rows(sizes, dtype="float32", device="cuda"), ["ex7"])
    inputs = [draw_inputs(sizes, seed) for seed in (0, 1)]
    (variant,) = prepare_row(row, maker, [backend], inputs, compile_mode="default", threads=1, folder=tmp_path)
    assert variant.error is not None
    assert variant.peak_bytes is not None
    assert variant.peak_bytes > variant.prepared.weight_bytes

"""The demo: its policy, its stopwatch, and a run through the command line with a policy that is smaller still."""

import contextlib
import io
import itertools
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from evla_compile import cli, demo, host, runtime
from evla_compile.artifact import find_manifest
from evla_compile.checkpoint import load, read_checkpoint
from evla_compile.config import CompileConfig
from evla_compile.demo import WARM_UP_CALLS, DemoResult, Step, measure_latencies, run_demo
from evla_compile.demo_policy import (
    DEMO_SIZES,
    INSTRUCTIONS,
    SPARE_EVERY,
    demo_frames,
    demo_weights,
    write_run_directory,
)
from evla_compile.manifest import read_manifest
from evla_compile.model.action import ActionSizes
from evla_compile.model.language import LanguageSizes
from evla_compile.model.policy import ModelSizes
from evla_compile.model.vision import TowerSizes
from evla_compile.processor import draw_noise
from evla_compile.tolerances import TOLERANCES

SIZES = ModelSizes(
    dino=TowerSizes(width=16, depth=2, heads=2, mlp_width=32, patches=16, class_tokens=1, layer_scale=True),
    siglip=TowerSizes(width=16, depth=2, heads=2, mlp_width=24, patches=16),
    projector=(32, 48, 32),
    language=LanguageSizes(width=32, layers=6, heads=2, kv_heads=2, mlp_width=256, vocabulary=32064),
    action=ActionSizes(
        width=24, depth=2, heads=2, mlp_width=32, condition_width=32, frequencies=16, chunk=16, action_width=7
    ),
)
CONFIG = CompileConfig(keep_layers=4, visual_tokens=8, cache_interval=2, ddim_steps=2)
BACKENDS = ("dense PyTorch, eager", "dense ONNX", "compiled ONNX")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    folder: Path
    result: DemoResult
    printed: str
    progress: str
    threads_after: int


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """`evla demo --out`, 80 columns wide, with the small sizes above; torch had 2 threads before."""
    folder, printed, progress = tmp_path_factory.mktemp("demo") / "kept", io.StringIO(), io.StringIO()
    results = []

    def run_small(folder: Path, *, runs: int, threads: int, step: Step) -> DemoResult:
        results.append(run_demo(folder, runs=runs, threads=threads, step=step, sizes=SIZES, config=CONFIG))
        return results[-1]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setattr("sys.argv", ["evla", "demo", "--out", str(folder), "--runs", "2"])
        patch.setattr(demo, "run_demo", run_small)
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(progress),
            pytest.raises(SystemExit) as end,
        ):
            cli.main()
    threads_after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert not end.value.code
    return Outcome(
        folder=folder,
        result=results[-1],
        printed=printed.getvalue(),
        progress=progress.getvalue(),
        threads_after=threads_after,
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The demo's own setting: torch with several threads is slow beyond measure where others use the CPUs too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_demo_policies_are_equal(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run_directory(tmp_path / name, SIZES)
    one, two = (torch.load(tmp_path / name / "checkpoints" / "demo.pt")["model"] for name in ("one", "two"))
    assert all(torch.equal(tensor, two[group][key]) for group, keys in one.items() for key, tensor in keys.items())
    for file in ("config.json", "dataset_statistics.json", "tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_weights_depend_on_the_name() -> None:
    one, two = (demo_weights(f"projector.projector.{layer}.weight", (4, 4)) for layer in (0, 2))
    assert not np.array_equal(one, two)
    assert one.dtype == np.float32


def test_a_run_directory_has_the_sizes_asked_for(tmp_path: Path) -> None:
    write_run_directory(tmp_path / "run", SIZES)
    assert read_checkpoint(tmp_path / "run").sizes == SIZES


def test_a_run_directory_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FileExistsError):
        write_run_directory(tmp_path / "run", SIZES)


@pytest.mark.usefixtures("one_thread")
def test_the_demo_policy_is_cogact_in_all_but_scale(tmp_path: Path) -> None:
    write_run_directory(tmp_path / "run", DEMO_SIZES)
    policy = load(tmp_path / "run")
    assert policy.sizes == DEMO_SIZES
    assert policy.sizes.image_side == 224
    action = policy.sizes.action
    assert (policy.sizes.patches, action.chunk, action.action_width) == (256, 16, 7)
    inputs = host.prepare(policy.processor, *demo_frames()[0], text_tokens=32, batch_size=1)
    arrays = (inputs.image, inputs.input_ids, inputs.text_length, draw_noise((1, 16, 7), 0))
    samples = policy.sample(*map(torch.from_numpy, arrays)).numpy()
    # Most samples are within the range of actions: the head denoises, as a trained one does, instead of blowing up.
    assert 0.1 < np.abs(samples).mean() < 0.7
    assert (np.abs(samples) > 1).mean() < 0.1


def test_demo_frames_show_one_rgb_frame_with_three_instructions() -> None:
    frames = demo_frames()
    assert tuple(frame.instruction for frame in frames) == INSTRUCTIONS
    assert {(frame.image.mode, frame.image.size) for frame in frames} == {("RGB", (320, 240))}  # type: ignore[union-attr]


def test_latencies_are_medians_and_percentiles_of_the_calls_after_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [9.0] * WARM_UP_CALLS + [0.001 * number for number in range(1, 22)]
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, duration) for duration in durations))
    monkeypatch.setattr(demo, "perf_counter", lambda: next(clock))
    (latency,) = measure_latencies({"only": lambda: None}, 21)
    assert latency.name == "only"
    assert latency.median == pytest.approx(11.0)
    assert latency.p95 == pytest.approx(20.0)


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    measure_latencies({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * (WARM_UP_CALLS + 2)


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="runs=0: expected a whole number from 1 up"):
        measure_latencies({}, 0)


def test_the_demo_verifies_both_variants(outcome: Outcome) -> None:
    dense, compiled = outcome.result.variants
    assert (dense.name, compiled.name) == ("dense", "compiled")
    for variant in (dense, compiled):
        assert all(error <= TOLERANCES.lowered for _, error in variant.verification.errors)
    assert all(deviation.relative <= TOLERANCES.samples for deviation in dense.report.deviations)
    assert compiled.onnx_bytes < dense.onnx_bytes


def test_the_demo_finds_the_layers_that_can_be_spared(outcome: Outcome) -> None:
    manifest = read_manifest(find_manifest(outcome.folder / "compiled"))
    assert manifest.config == CONFIG
    assert manifest.plan.keep_layers == tuple(layer for layer in range(6) if layer % SPARE_EVERY != SPARE_EVERY - 1)


def test_the_demo_times_every_backend(outcome: Outcome) -> None:
    assert tuple(latency.name for latency in outcome.result.latencies) == BACKENDS
    assert all(0 < latency.median <= latency.p95 for latency in outcome.result.latencies)


def test_the_demo_predicts_what_its_artifact_predicts(outcome: Outcome) -> None:
    assert outcome.result.actions.shape == (16, 7)
    again = runtime.load(outcome.folder / "compiled").predict_action(*demo_frames()[0])
    np.testing.assert_allclose(outcome.result.actions, again, rtol=0, atol=1e-6)


def test_the_demo_prints_its_tables_within_80_columns(outcome: Outcome) -> None:
    lines = outcome.printed.splitlines()
    assert max(map(len, lines[: lines.index(next(line for line in lines if line.startswith("Written to")))])) <= 80
    assert "\u2026" not in outcome.printed
    words = " ".join(outcome.printed.split())
    for pass_report in outcome.result.variants[1].report.passes:
        assert pass_report.name.partition("(")[0] in words
    for expected in (*BACKENDS, "step dx dy dz droll dpitch dyaw gripper", "weights of this policy are random"):
        assert expected in words
    assert [line.split()[0] for line in lines if len(line.split()) == 8][-16:] == list(map(str, range(16)))


def test_the_demo_says_what_a_latency_includes(outcome: Outcome) -> None:
    words = " ".join(outcome.printed.split())
    assert "from the squashed frame and the token ids in memory to the raw samples: 2 calls of each" in words
    assert f"torch {torch.__version__}" in words


def test_the_demo_shows_its_long_steps_on_standard_error(outcome: Outcome) -> None:
    for step in ("load it", "calibrate", "dense: export it to ONNX", "compiled: verify it on ONNX Runtime"):
        assert step in outcome.progress


def test_the_demo_keeps_everything_in_out_for_every_user(outcome: Outcome) -> None:
    assert sorted(path.name for path in outcome.folder.iterdir()) == ["compiled", "dense", "run"]
    assert stat.S_IMODE(outcome.folder.stat().st_mode) == stat.S_IMODE(outcome.folder.joinpath("run").stat().st_mode)
    assert [path.name for path in outcome.folder.parent.iterdir()] == ["kept"]
    statistics = json.loads((outcome.folder / "run" / "dataset_statistics.json").read_text())
    assert list(statistics) == ["demo"]


def test_the_demo_leaves_torchs_threads_as_they_were(outcome: Outcome) -> None:
    assert outcome.threads_after == 2

"""The demo: its policy, its stopwatch, and a run through the command line."""

import contextlib
import io
import itertools
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evla_compile import cli, runtime
from evla_compile.artifact.files import find_manifest
from evla_compile.artifact.manifest import read_manifest
from evla_compile.demo import demo
from evla_compile.demo.demo import DEMO_CONFIG, PICTURE, WARM_UP_CALLS, DemoResult, Step, measure_latencies, run_demo
from evla_compile.demo.shipped_policy import DEMO_POLICY, calibration_frames, demo_frame
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.host.picture import draw_kept_tokens, kept_tokens_text
from evla_compile.settings.tolerances import TOLERANCES

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
    """`evla demo --out`, 80 columns wide; torch had 2 threads before."""
    folder, printed, progress = tmp_path_factory.mktemp("demo") / "kept", io.StringIO(), io.StringIO()
    results = []

    def keep_result(folder: Path, *, runs: int, threads: int, step: Step) -> DemoResult:
        results.append(run_demo(folder, runs=runs, threads=threads, step=step))
        return results[-1]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setattr("sys.argv", ["evla", "demo", "--out", str(folder), "--runs", "2"])
        patch.setattr(demo, "run_demo", keep_result)
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


def test_the_demo_policy_is_cogact_in_all_but_scale() -> None:
    policy = load(DEMO_POLICY)
    side, action = policy.sizes.image_side, policy.sizes.action
    assert (side, policy.sizes.patches, policy.sizes.language.layers) == (112, 64, 12)
    assert (action.chunk, action.action_width) == (16, 7)
    assert list(policy.processor.statistics) == ["metaworld"]
    assert policy.processor.pad_id == 0
    assert policy.processor.blank_id < policy.sizes.language.vocabulary < 1000


def test_the_demo_policy_is_small_enough_to_be_carried() -> None:
    files = [file for file in DEMO_POLICY.rglob("*") if file.is_file()]
    (weights,) = (file for file in files if file.suffix == ".pt")
    assert weights.stat().st_size <= 32_000_000
    assert sum(file.stat().st_size for file in files) - weights.stat().st_size < 1_500_000
    stored = torch.load(weights, weights_only=True, mmap=True)["model"]
    assert {tensor.dtype for group in stored.values() for tensor in group.values()} == {torch.float16}


def test_the_demos_frames_are_rgb_and_its_own_is_not_calibrated_on() -> None:
    frames, shown = calibration_frames(), demo_frame()
    assert len(frames) == 200
    assert len({frame.instruction for frame in frames}) == 5
    pixels = [np.asarray(frame.image) for frame in (*frames, shown)]
    assert [array.shape for array in pixels] == [(112, 112, 3)] * 200 + [(224, 224, 3)]
    assert len({frame.episode for frame in frames}) == 100
    assert not any(np.array_equal(array, pixels[-1]) for array in pixels[:-1])


def test_the_instruction_decides_what_the_demo_policy_does() -> None:
    policy, frame = load(DEMO_POLICY), next(f for f in calibration_frames() if f.instruction == "open the window")
    chunks = [policy.predict_action(frame.image, text, seed=0) for text in (frame.instruction, "close the window")]
    again = policy.predict_action(frame.image, "slide the window open", seed=0)
    translations = [1000 * chunk[:8, :3] for chunk in (*chunks, again)]
    apart = [float(np.linalg.norm(found - translations[0], axis=1).mean()) for found in translations[1:]]
    assert apart[0] > 2 * apart[1]


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


def test_the_demo_compiles_with_its_settings(outcome: Outcome) -> None:
    manifest = read_manifest(find_manifest(outcome.folder / "compiled"))
    assert manifest.config == DEMO_CONFIG.resolve(load(DEMO_POLICY).sizes)
    assert manifest.plan.frames == len(calibration_frames())


def test_the_demo_shows_the_kept_tokens_on_its_frame(outcome: Outcome) -> None:
    kept = outcome.result.kept_tokens
    assert kept.shape == (14,)
    with Image.open(outcome.folder / PICTURE) as picture:
        drawn = draw_kept_tokens(demo_frame().image, kept, 64, instruction=demo_frame().instruction)
        assert np.array_equal(np.asarray(picture), np.asarray(drawn))
    assert all(line in outcome.printed for line in kept_tokens_text(kept, 64).splitlines())


def test_the_demo_times_every_backend(outcome: Outcome) -> None:
    assert tuple(latency.name for latency in outcome.result.latencies) == BACKENDS
    assert all(0 < latency.median <= latency.p95 for latency in outcome.result.latencies)


def test_the_demo_predicts_what_its_artifact_predicts(outcome: Outcome) -> None:
    assert outcome.result.actions.shape == (16, 7)
    again = runtime.load(outcome.folder / "compiled").predict_action(*demo_frame())
    np.testing.assert_allclose(outcome.result.actions, again, rtol=0, atol=1e-6)


def test_the_demo_prints_its_tables_within_80_columns(outcome: Outcome) -> None:
    lines = outcome.printed.splitlines()
    assert max(map(len, lines[: lines.index(next(line for line in lines if line.startswith("Written to")))])) <= 80
    assert "\u2026" not in outcome.printed
    words = " ".join(outcome.printed.split())
    for pass_report in outcome.result.variants[1].report.passes:
        assert pass_report.name.partition("(")[0] in words
    for expected in (
        *BACKENDS,
        "step dx dy dz droll dpitch dyaw gripper",
        "Visual tokens kept of this frame, 14 of 64 (## kept, .. dropped):",
    ):
        assert expected in words
    assert [line.split()[0] for line in lines if len(line.split()) == 8][-16:] == list(map(str, range(16)))


def test_the_command_that_the_demo_prints_repeats_its_actions(
    outcome: Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = (line for line in outcome.printed.splitlines() if line.startswith("  evla run "))
    monkeypatch.setattr("sys.argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 8]
    printed = [line.split() for line in outcome.printed.splitlines() if len(line.split()) == 8]
    assert rows[-16:] == printed[-16:]


def test_the_demo_says_what_a_latency_includes(outcome: Outcome) -> None:
    words = " ".join(outcome.printed.split())
    assert "from the squashed frame and the token ids in memory to the raw samples: 2 calls of each" in words
    assert f"torch {torch.__version__}" in words


def test_the_demo_shows_its_long_steps_on_standard_error(outcome: Outcome) -> None:
    for step in (
        "load the policy",
        "compiled: calibrate on 200 frames",
        "dense: export it to ONNX",
        "compiled: verify it on ONNX Runtime",
    ):
        assert step in outcome.progress


def test_the_demo_keeps_everything_in_out_for_every_user(outcome: Outcome) -> None:
    assert sorted(path.name for path in outcome.folder.iterdir()) == ["compiled", "dense", PICTURE]
    inside = outcome.folder / "compiled"
    assert stat.S_IMODE(outcome.folder.stat().st_mode) == stat.S_IMODE(inside.stat().st_mode)
    assert [path.name for path in outcome.folder.parent.iterdir()] == ["kept"]


def test_the_demo_leaves_torchs_threads_as_they_were(outcome: Outcome) -> None:
    assert outcome.threads_after == 2

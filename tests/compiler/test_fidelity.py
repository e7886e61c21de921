"""Fidelity of a compilation against both policies run frame by frame: the compiled graph and the eager dense policy."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import evla_compile as evla
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.fidelity.chunks import ActionChunks, digest_frames, frame_noise
from evla_compile.fidelity.measure import compare_chunks
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import GraphInputs
from evla_compile.host.processor import ActionStatistics, Processor
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.schedule import DDIM_STEPS

DENSE = CompileConfig.dense(text_tokens=9)
CUT = replace(
    DENSE, keep_layers=(0, 2, 3), mlp_keep=0.5, visual_tokens=5, token_rule="coverage", merge_tokens=True, key_tokens=1
)
CONFIGS = {
    "dense": DENSE,
    "cut": CUT,
    "relevance, two rows": replace(CUT, token_rule="relevance", merge_tokens=False, batch_size=2),
    "cached": replace(CUT, cache_interval=5),
    "cached, extrapolated": replace(DENSE, cache_steps=(0, 3, 7), cache_extrapolate=True),
    "fewer steps": replace(DENSE, ddim_steps=5),
    "solver": replace(DENSE, solver="dpm++", solver_timesteps=(90, 45, 10)),
    "vision": replace(DENSE, vision_mlp_keep=0.5, repair_frames=6),
    "repaired": replace(CUT, repair="all", repair_frames=6, repair_rho=0.1),
    "no guidance": replace(CUT, cfg_scale=1.0),
}
STATISTICS = ActionStatistics(low=(-0.05,) * 6 + (0.0,), high=(0.05,) * 6 + (1.0,), mask=(True,) * 6 + (False,))


@pytest.fixture(scope="module")
def policy(small_policy: CogACT) -> CogACT:
    found = copy(small_policy)
    known = small_policy.processor
    found.processor = Processor(
        tokenizer_json=known.tokenizer_json, statistics={"set": STATISTICS}, image_side=known.image_side, pad_id=0
    )
    return found


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    draw = np.random.Generator(np.random.PCG64(5))
    return [
        Frame(draw.integers(0, 256, (56, 56, 3), dtype=np.uint8), text, f"{text} {episode}")
        for text in ("go", "turn it off")
        for episode in range(3)
        for _ in range(3)
    ]


def one_by_one(compiled: evla.CompiledPolicy, frames: list[Frame]) -> ActionChunks:
    shape = compiled.noise_shape[1:]
    samples = np.empty((2, len(frames), *shape), dtype=np.float32)
    for place, frame in enumerate(frames):
        for draw, noise in enumerate(frame_noise(place, 2, (shape[0], shape[1]))):
            rows = compiled.config.batch_size
            inputs = GraphInputs.prepare(
                compiled.processor,
                [frame.image] * rows,
                [frame.instruction] * rows,
                compiled.signature,
                noise=np.stack([noise] * rows),
            )
            samples[draw, place] = compiled.sample(*inputs.arrays)[0]
    return ActionChunks(samples=samples, frames=digest_frames(compiled.processor, frames))


def eager(policy: CogACT, frames: list[Frame], cfg_scale: float) -> ActionChunks:
    action = policy.sizes.action
    samples = np.empty((2, len(frames), action.chunk, action.action_width), dtype=np.float32)
    for place, frame in enumerate(frames):
        image = torch.from_numpy(policy.processor.image(frame.image))[None]
        ids = torch.tensor([policy.processor.prompt_ids(frame.instruction)])
        for draw, noise in enumerate(frame_noise(place, 2, (action.chunk, action.action_width))):
            found = policy.sample(
                image,
                ids,
                torch.tensor([ids.shape[1]]),
                torch.from_numpy(noise)[None],
                ddim_steps=DDIM_STEPS,
                cfg_scale=cfg_scale,
            )
            samples[draw, place] = found[0].numpy()
    return ActionChunks(samples=samples, frames=digest_frames(policy.processor, frames))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_report_says_what_frame_by_frame_runs_say(name: str, policy: CogACT, frames: list[Frame]) -> None:
    config = CONFIGS[name]
    compiled = evla.compile(policy, config, calibration=frames, progress=False)
    reports = [compiled.report]
    if name == "cut":  # beside a plan the dense policy runs for the fidelity alone
        again = evla.compile(policy, config, calibration=frames, plan=compiled.plan, progress=False)
        reports.append(again.report)
    found, right = one_by_one(compiled, frames), eager(policy, frames, config.cfg_scale)
    expected = compare_chunks(right, found, STATISTICS, frames, horizon=5)
    for report in reports:
        fidelity = report.fidelity
        assert fidelity is not None
        assert fidelity.beyond_noise == expected.beyond_noise
        assert fidelity.drift == pytest.approx(expected.drift, rel=1e-3, abs=1e-3)
        assert fidelity.end.own == pytest.approx(expected.end.own, rel=1e-4)
        assert fidelity.end.mean == pytest.approx(expected.end.mean, rel=1e-3, abs=1e-3)
        assert fidelity.step.worst == pytest.approx(expected.step.worst, rel=1e-3, abs=1e-3)
        assert {each.episode: each.mean for each in fidelity.episodes} == pytest.approx(
            {each.episode: each.mean for each in expected.episodes}, rel=1e-3, abs=1e-3
        )
    assert (expected.end.mean < 1e-2) == (name in ("dense", "vision"))  # the refit of these towers loses nothing


def test_the_report_prints_the_headline_and_how_to_read_it(policy: CogACT, frames: list[Frame]) -> None:
    report = evla.compile(policy, CUT, calibration=frames, progress=False).report
    assert report.fidelity is not None
    assert report.fidelity.line() in str(report)
    assert "how to read it" in str(report)
    assert report.to_json()["fidelity"]["frames"] == len(frames)


def test_without_frames_or_actions_there_is_none(policy: CogACT, small_policy: CogACT, frames: list[Frame]) -> None:
    plan = evla.calibrate(policy, frames, CUT, progress=False)
    assert evla.compile(policy, CUT, plan=plan).report.fidelity is None
    assert evla.compile(small_policy, CUT, plan=plan, calibration=frames, progress=False).report.fidelity is None
    assert "fidelity" not in str(evla.compile(policy, CUT, plan=plan).report)


def test_record_and_measure_take_policies_and_records_alike(policy: CogACT, frames: list[Frame]) -> None:
    compiled = evla.compile(policy, CUT, calibration=frames, progress=False)
    dense = evla.record_chunks(policy, frames, progress=False)
    np.testing.assert_allclose(dense.samples, eager(policy, frames, 1.5).samples, rtol=1e-4, atol=1e-4)
    found = evla.record_chunks(compiled, frames, progress=False)
    np.testing.assert_allclose(found.samples, one_by_one(compiled, frames).samples, rtol=1e-4, atol=1e-4)
    results = [
        evla.measure_fidelity(left, right, frames, horizon=5, progress=False)
        for left, right in ((compiled, policy), (compiled, dense), (found, policy))
    ]
    assert {each.beyond_noise for each in results} == {results[0].beyond_noise}
    assert compiled.report.fidelity is not None
    assert results[0].end.mean == pytest.approx(compiled.report.fidelity.end.mean, rel=1e-3)


def test_two_records_or_an_unknown_dataset_are_refused(policy: CogACT, frames: list[Frame]) -> None:
    dense = evla.record_chunks(policy, frames[:2], progress=False)
    with pytest.raises(ValueError, match="both policies are recorded"):
        evla.measure_fidelity(dense, dense, frames[:2], horizon=5, progress=False)
    with pytest.raises(ValueError, match="other"):
        evla.measure_fidelity(dense, policy, frames[:2], horizon=5, unnorm_key="other", progress=False)

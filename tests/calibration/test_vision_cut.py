"""The cut of the vision towers against eager towers that are cut and refit by hand with `numpy.linalg.lstsq`."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import evla_compile as evla
from evla_compile.calibration import vision_cut
from evla_compile.calibration.calibrate import calibrate
from evla_compile.calibration.ridge import RidgeRegression, RidgeSolution
from evla_compile.calibration.vision_cut import RHOS
from evla_compile.errors import CalibrationError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.families.cogact.model.vision import normalize_pixels
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import draw_noise
from evla_compile.settings.budgets.budget import decision_of
from evla_compile.settings.budgets.repair import RepairDecision
from evla_compile.settings.budgets.vision import VisionDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan

CONFIG = replace(CompileConfig.dense(text_tokens=9, ddim_steps=2), vision_mlp_keep=0.5, repair_frames=6, repair_rho=0.1)
TOWERS = ("dino_featurizer", "siglip_featurizer")


@pytest.fixture(scope="module")
def policy(small_policy: CogACT) -> CogACT:
    """The small policy with towers of two blocks, 128 neurons in each, of which a few matter most."""
    sizes = small_policy.sizes
    sizes = replace(
        sizes,
        dino=replace(sizes.dino, depth=3, mlp_width=128),
        siglip=replace(sizes.siglip, depth=3, mlp_width=128),
    )
    found = CogACT(sizes, small_policy.processor).eval().requires_grad_(False)
    known, generator = small_policy.state_dict(), torch.Generator().manual_seed(2)
    for name, parameter in found.named_parameters():
        if name in known and known[name].shape == parameter.shape:
            parameter.copy_(known[name])
        elif parameter.ndim == 1:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) + name.endswith("gamma"))
        else:
            drawn = torch.randn(parameter.shape, generator=generator) * math.prod(parameter.shape[1:]) ** -0.5
            parameter.copy_(drawn * torch.linspace(0.2, 2.0, len(drawn))[:, None])
    return found


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    """Five episodes of four frames; the fifth is held out. A few colours, so that there is something to learn."""
    draw = np.random.Generator(np.random.PCG64(8))
    images = draw.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8).repeat(14, axis=1).repeat(14, axis=2)
    return [Frame(image, "go", f"{place // 4}") for place, image in enumerate(images)]


@pytest.fixture(scope="module")
def plan(policy: CogACT, frames: list[Frame]) -> Plan:
    return calibrate(policy, frames, CONFIG, progress=False)


def lstsq(x: NDArray[np.float64], y: NDArray[np.float64], rho: float) -> tuple[Tensor, Tensor]:
    a, b = x - x.mean(axis=0), y - y.mean(axis=0)
    penalty = np.sqrt(rho * np.mean(np.sum(a**2, axis=0)))
    found = np.linalg.lstsq(
        np.vstack([a, penalty * np.eye(x.shape[1])]), np.vstack([b, np.zeros((x.shape[1], y.shape[1]))])
    )[0]
    return torch.from_numpy(found.T), torch.from_numpy(y.mean(axis=0) - found.T @ x.mean(axis=0))


def by_hand(policy: CogACT, frames: list[Frame]) -> dict[str, tuple[list[int], float, Any, tuple[float, float]]]:
    """Cut and refit all blocks of a copy; return neurons, rho, the block, and how far it moved, by path."""
    images = torch.from_numpy(np.stack([policy.processor.image(frame.image) for frame in frames]))
    held = torch.tensor([frame.episode == "4" for frame in frames])
    found: dict[str, Any] = {}
    for tower, pixels in zip(TOWERS, normalize_pixels(images), strict=True):
        dense: Any = getattr(policy.vision_backbone, tower)
        states = cut = dense.embed(pixels)
        for number, block in enumerate(dense.blocks):
            goal = block(states)
            every = block.mlp.act(block.mlp.fc1(block.norm2(states + block.ls1(block.attn(block.norm1(states))))))
            score = every.double().flatten(0, 1).std(dim=0, correction=0) * block.mlp.fc2.weight.double().norm(dim=0)
            kept = sorted(score.argsort(descending=True)[:64].tolist())
            attended = cut + block.ls1(block.attn(block.norm1(cut)))
            neurons = block.mlp.act(block.mlp.fc1(block.norm2(attended)))[..., kept].double()
            scale = block.ls2.gamma.double() if hasattr(block.ls2, "gamma") else torch.ones(1, dtype=torch.float64)
            wanted = (goal.double() - attended.double()) / scale
            weight, bias = block.mlp.fc2.weight[:, kept].double(), block.mlp.fc2.bias.double()
            left = wanted - neurons @ weight.T - bias
            trials = {0.0: (weight, bias)}
            for rho in RHOS:
                x, y = (value[~held].flatten(0, 1).numpy() for value in (neurons, left))
                change, shift = lstsq(x, y, rho)
                trials[rho] = weight + change, bias + shift

            apart = {rho: scale * (wanted - neurons @ matrix.T - added) for rho, (matrix, added) in trials.items()}
            moved = {rho: float(each[held].norm() / goal[held].norm()) for rho, each in apart.items()}
            best = min(moved, key=moved.__getitem__)
            matrix, added = trials[best]
            cut = (attended + scale * (neurons @ matrix.T + added)).float()
            states = goal
            found[f"vision_backbone.{tower}.blocks.{number}"] = kept, best, trials[best], (moved[0.0], moved[best])
    return found


def test_it_equals_least_squares_by_hand(policy: CogACT, frames: list[Frame], plan: Plan) -> None:
    expected, blocks = by_hand(policy, frames), decision_of(VisionDecision, plan.decisions).blocks
    assert [block.path for block in blocks] == list(expected)
    assert any(block.rho for block in blocks)
    for block in blocks:
        kept, rho, (weight, bias), moved = expected[block.path]
        assert (list(block.neurons), block.rho) == (kept, rho)
        assert block.moved == pytest.approx(moved, rel=1e-4)
        assert block.moved[1] <= block.moved[0]
        if rho:
            found = [np.array(plan.tensors[f"{block.path}.mlp.fc2.{name}"].values) for name in ("weight", "bias")]
            for tensor, wanted in zip(found, (weight, bias), strict=True):
                assert np.abs(tensor - wanted.numpy()).max() < 1e-4 * wanted.abs().max()


def test_the_decoder_is_repaired_on_what_the_cut_towers_yield(policy: CogACT, frames: list[Frame]) -> None:
    """The unrepaired trial is the policy with the cut alone, compiled on its own and compared at equal noise."""
    config = replace(CONFIG, repair="all")
    compiled = evla.compile(policy, config, calibration=frames, progress=False)
    decision = decision_of(RepairDecision, compiled.plan.decisions)
    alone = evla.compile(policy, CONFIG, calibration=frames, progress=False)
    apart = []
    for place in range(16, 20):
        ids = policy.processor.prompt_ids("go")
        image = torch.from_numpy(policy.processor.image(frames[place].image))[None]
        padded, length = torch.tensor([[*ids, *[0] * (9 - len(ids))]]), torch.tensor([len(ids)])
        shape = (policy.sizes.action.chunk, policy.sizes.action.action_width)
        noise = torch.from_numpy(draw_noise(shape, place))[None]
        found = alone.outputs(*(each.numpy() for each in (image, padded, length, noise)))["samples"]
        dense = policy.sample(image, padded, length, noise, ddim_steps=2, cfg_scale=1.5).numpy()
        apart.append(np.abs(found.clip(-1, 1) - dense.clip(-1, 1)).mean())
    assert decision.trials[0].deviation == pytest.approx(np.mean(apart), rel=1e-3)


def test_weights_stay_where_no_fit_is_nearer(
    policy: CogACT, frames: list[Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    def solve(self: RidgeRegression, rho: float) -> RidgeSolution:
        found = original(self, rho)
        return replace(found, factor=found.factor + 1.0, bias=found.bias + 1.0)

    original = RidgeRegression.solve
    monkeypatch.setattr(RidgeRegression, "solve", solve)
    found = calibrate(policy, frames, CONFIG, progress=False)
    blocks = decision_of(VisionDecision, found.decisions).blocks
    assert {block.rho for block in blocks} == {0.0}
    assert all(block.moved[0] == block.moved[1] > 0 for block in blocks)
    assert found.tensors == {}


def test_a_plan_makes_the_same_policy_and_holds_the_ranges_of_the_cut(
    policy: CogACT, frames: list[Frame], plan: Plan, tmp_path: Path
) -> None:
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    first, second = (evla.compile(policy, CONFIG, plan=each, progress=False) for each in (plan, read))
    inputs = [
        policy.processor.image(frames[3].image)[None],
        np.array([[1, 5, *[0] * 7]]),
        np.array([2]),
        draw_noise((policy.sizes.action.chunk, policy.sizes.action.action_width), 0)[None],
    ]
    samples = [each.outputs(*inputs)["samples"] for each in (first, second)]
    assert np.array_equal(samples[0], samples[1])
    paths = dict(plan.ranges)
    assert all(f"vision_backbone.{tower}.blocks.1.mlp.fc2" in paths for tower in TOWERS)


def test_too_few_frames_are_refused(policy: CogACT, frames: list[Frame]) -> None:
    with pytest.raises(CalibrationError, match=r"needs about 40 calibration frames for each instruction"):
        calibrate(policy, frames, replace(CONFIG, repair_frames=40), progress=False)


class InterruptedForTestError(Exception):
    """What stops a calibration here."""


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_cut_goes_on_behind_the_last_finished_block(
    after: int, policy: CogACT, frames: list[Frame], plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls, original = [0], vision_cut._Fit._refit

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise InterruptedForTestError
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(vision_cut._Fit, "_refit", counted)
        with pytest.raises(InterruptedForTestError):
            calibrate(policy, frames, CONFIG, progress=False, scratch=tmp_path)
    calls[0] = -100
    with monkeypatch.context() as patch:
        patch.setattr(vision_cut._Fit, "_refit", counted)
        assert calibrate(policy, frames, CONFIG, progress=False, scratch=tmp_path) == plan
    assert calls[0] == -100 + 4 - after
    assert list(tmp_path.iterdir()) == []

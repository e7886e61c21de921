"""Repair against an eager policy that is refit by hand, frame by frame, with `numpy.linalg.lstsq`."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import evla_compile as evla
from evla_compile.calibration import calibrate as calibration
from evla_compile.calibration import repair_trials
from evla_compile.calibration.calibrate import calibrate
from evla_compile.calibration.repair import Repair
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.errors import CalibrationError
from evla_compile.families.cogact.model.language import rotary_tables
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.walk import GraphWalk
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import draw_noise
from evla_compile.settings.budgets.budget import decision_of
from evla_compile.settings.budgets.repair import RepairDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan

RHO = 0.1
WEIGHTS = (0.1, 1.0, 20.0)
CONFIG = CompileConfig(
    keep_layers=(0, 1, 3),
    mlp_keep=1.0,
    visual_tokens=None,
    repair="all",
    repair_rho=RHO,
    repair_weights=WEIGHTS,
    repair_frames=6,
    text_tokens=9,
    ddim_steps=2,
    cache_interval=1,
)
MERGED = replace(CONFIG, visual_tokens=5, token_rule="coverage", merge_tokens=True)
GATHERED = replace(CONFIG, visual_tokens=5, token_rule="relevance", merge_tokens=False, key_tokens=1)


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    """Three episodes of four frames for each of two instructions; the last episode of each is held out."""
    draw = np.random.Generator(np.random.PCG64(5))
    return [
        Frame(draw.integers(0, 256, (56, 56, 3), dtype=np.uint8), text, f"{text} {episode}")
        for text in ("go", "turn it off")
        for episode in range(3)
        for _ in range(4)
    ]


@pytest.fixture(scope="module", params=[CONFIG, MERGED, GATHERED], ids=["all tokens", "merged", "gathered"])
def compiled(request: pytest.FixtureRequest, small_policy: CogACT, frames: list[Frame]) -> CompiledPolicy:
    """The small policy with all kept layers repaired, whatever its random weights make of the held-out frames."""
    better = iter((4.0, 3.0, 2.0, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair_trials, "action_deviation", lambda *_: next(better))
        return evla.compile(small_policy, request.param, calibration=frames, progress=False)


def repair_of(plan: Plan) -> RepairDecision:
    return decision_of(RepairDecision, plan.decisions)


def lstsq(
    x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64], *blocks: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Solve the ridge regression of y on x, weighted means removed, as one augmented least-squares problem."""
    scale = np.ones(x.shape[1])
    for first, last in zip(np.cumsum((0, *blocks)), np.cumsum(blocks), strict=False):
        scale[first:last] = np.sqrt(np.mean(x[:, first:last] ** 2))
    x = x / scale
    mean_x, mean_y = np.average(x, axis=0, weights=weights), np.average(y, axis=0, weights=weights)
    a, b = np.sqrt(weights)[:, None] * (x - mean_x), np.sqrt(weights)[:, None] * (y - mean_y)
    penalty = np.sqrt(RHO * np.mean(np.sum(a**2, axis=0)))
    width = x.shape[1]
    found = np.linalg.lstsq(np.vstack([a, penalty * np.eye(width)]), np.vstack([b, np.zeros((width, b.shape[1]))]))[0]
    return found.T / scale, mean_y - found.T @ mean_x


def eager_inputs(policy: CogACT, frame: Frame, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the inputs of a graph with nine text tokens."""
    ids = policy.processor.prompt_ids(frame.instruction)
    image = torch.from_numpy(policy.processor.image(frame.image))[None]
    shape = (policy.sizes.action.chunk, policy.sizes.action.action_width)
    noise = torch.from_numpy(draw_noise(shape, seed))[None]
    return image, torch.tensor([[*ids, *[0] * (9 - len(ids))]]), torch.tensor([len(ids)]), noise


class Eager:
    """The small policy's decoder on one frame, layer by layer."""

    def __init__(self, policy: CogACT, compiled: CompiledPolicy, frame: Frame) -> None:
        ids = torch.tensor([policy.processor.prompt_ids(frame.instruction)])
        decoder = policy.llm_backbone.llm.model
        image = torch.from_numpy(policy.processor.image(frame.image))[None]
        text = decoder.embed_tokens(ids)
        patches = policy.projector(policy.vision_backbone(image))
        self.states = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
        self.rotary = rotary_tables(self.states, decoder.head_width)
        self.patches, self.text = patches.shape[1], ids.shape[1]
        self.matrix: Tensor | None = None
        self.kept: Tensor | None = None
        if compiled.config.visual_tokens is not None:
            stages = ("kept_patches", *(("merge_weights",) if compiled.config.merge_tokens else ()))
            inputs = eager_inputs(policy, frame, 0)
            found = compiled.outputs(*(part.numpy() for part in inputs), stages=stages)
            self.kept = torch.from_numpy(found["kept_patches"])[0]
            self.matrix = nn.functional.one_hot(self.kept, self.patches).float()
            if "merge_weights" in found:
                self.matrix = torch.from_numpy(found["merge_weights"])[0]

    def select(self, states: Tensor) -> Tensor:
        """Return states [1,S,D] at the positions that stay, merged."""
        if self.matrix is None:
            return states
        visual = self.matrix @ states[0, 1 : 1 + self.patches]
        return torch.cat([states[:, :1], visual[None], states[:, 1 + self.patches :]], dim=1)

    def shorten(self) -> None:
        """Select, as behind the second kept layer."""
        self.states = self.select(self.states)
        if self.kept is not None:
            places = torch.cat([torch.tensor([0]), 1 + self.kept, torch.arange(self.text - 1) + 1 + self.patches])
            self.rotary = (self.rotary[0][:, places], self.rotary[1][:, places])

    def weights(self) -> NDArray[np.float64]:
        visual, text, cognition = WEIGHTS
        middle = self.states.shape[1] - self.text
        return np.array([text, *[visual] * middle, *[text] * (self.text - 2), cognition])


def refit_by_hand(policy: CogACT, compiled: CompiledPolicy, frames: Sequence[Frame]) -> dict[str, Tensor]:
    """Repair the kept layers, the dense policy's states as targets, and return the new tensors."""
    keep, refit = compiled.plan.keep_layers, repair_of(compiled.plan).layers
    dense: Any = policy.llm_backbone.llm.model.layers
    layers: Any = deepcopy(dense)
    runs = [Eager(policy, compiled, frame) for frame in frames]
    behind: list[list[Tensor]] = []  # dense states behind every layer
    for run in runs:
        states = [run.states]
        for layer in dense:
            states.append(forward(layer, states[-1], run.rotary))
        behind.append(states[1:])
    found: dict[str, Tensor] = {}
    shortened = False
    for place, index in enumerate(keep):
        layer = layers[index]
        following = keep[place + 1] if place + 1 < len(keep) else len(dense)
        targets = [states[following - 1] for states in behind]
        if shortened:
            targets = [run.select(target) for run, target in zip(runs, targets, strict=True)]
        if index in refit:
            weights = np.concatenate([run.weights() for run in runs])
            parts = [inside(layer, run) for run in runs]
            context, attended, neurons = (np.concatenate(each) for each in zip(*parts, strict=True))
            target = np.concatenate([rows(each) for each in targets])
            residual = target - attended - neurons @ rows(layer.mlp.down_proj.weight).T
            width = context.shape[1]
            joint, _ = lstsq(np.hstack([context, neurons]), residual, weights, width, neurons.shape[1])
            change(layer.self_attn.o_proj, joint[:, :width])
            parts = [inside(layer, run) for run in runs]
            context, attended, neurons = (np.concatenate(each) for each in zip(*parts, strict=True))
            residual = target - attended - neurons @ rows(layer.mlp.down_proj.weight).T
            down, bias = lstsq(neurons, residual, weights)
            change(layer.mlp.down_proj, down)
            layer.mlp.down_proj.bias = nn.Parameter(torch.from_numpy(bias).float(), requires_grad=False)
            path = f"llm_backbone.llm.model.layers.{index}"
            found[f"{path}.self_attn.o_proj.weight"] = layer.self_attn.o_proj.weight
            found[f"{path}.mlp.down_proj.weight"] = layer.mlp.down_proj.weight
            found[f"{path}.mlp.down_proj.bias"] = layer.mlp.down_proj.bias
        for run in runs:
            run.states = forward(layer, run.states, run.rotary)
        if place == 1:
            for run in runs:
                run.shorten()
            shortened = compiled.config.visual_tokens is not None
    return found


def forward(layer: Any, states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    out: Tensor = layer(states, attention_mask=None, use_cache=False, position_embeddings=rotary)
    return out


def inside(layer: Any, run: Eager) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return context, attended stream and neurons of a layer on a frame, [S,...]."""
    seen: dict[str, Tensor] = {}
    modules = {"context": layer.self_attn.o_proj, "neurons": layer.mlp.down_proj}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
        for name, module in modules.items()
    ]
    forward(layer, run.states, run.rotary)
    for hook in hooks:
        hook.remove()
    attended = run.states + layer.self_attn.o_proj(seen["context"])
    return rows(seen["context"]), rows(attended), rows(seen["neurons"])


def rows(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.reshape(-1, tensor.shape[-1]).double().numpy()


def change(projection: nn.Linear, by: NDArray[np.float64]) -> None:
    projection.weight = nn.Parameter((projection.weight.double() + torch.from_numpy(by)).float(), requires_grad=False)


def test_it_equals_least_squares_by_hand(compiled: CompiledPolicy, small_policy: CogACT, frames: list[Frame]) -> None:
    fitted = [frame for frame in frames if frame.episode is not None and not frame.episode.endswith("2")]
    decision = repair_of(compiled.plan)
    assert (decision.scope, decision.layers) == ("all", (0, 1, 3))
    assert (decision.fitted, decision.held_out) == (16, 8)
    expected = refit_by_hand(small_policy, compiled, fitted)
    found = compiled.plan.tensors
    assert sorted(found) == sorted(expected)
    before = small_policy.state_dict()
    for name, tensor in expected.items():
        moved = 1.0 if name.endswith("bias") else (tensor - before[name]).norm().item()
        assert moved > 0.01 or ".layers.0." in name  # nothing is missing in front of layer 1
        error = (torch.from_numpy(np.array(found[name].values)) - tensor).norm().item()
        assert error < 1e-4 * max(moved, tensor.norm().item()), name


def test_what_is_taken_is_best_on_frames_that_were_not_fitted(small_policy: CogACT, frames: list[Frame]) -> None:
    """Judged as a user would: each trial's policy compiled on its own, its actions compared with the dense policy's."""
    decision = repair_of(calibrate(small_policy, frames, CONFIG, progress=False))
    assert [trial.scope for trial in decision.trials] == ["none", "last", "gaps", "all"]
    assert decision.chosen.deviation == min(trial.deviation for trial in decision.trials)
    held = [place for place, frame in enumerate(frames) if frame.episode is not None and frame.episode.endswith("2")]
    unrepaired = evla.compile(small_policy, replace(CONFIG, repair="none", keep_layers=(0, 1, 3)), progress=False)
    apart = []
    for place in held:
        inputs = [part.numpy() for part in eager_inputs(small_policy, frames[place], place)]
        found = unrepaired.outputs(*inputs)["samples"]
        dense = small_policy.sample(*map(torch.from_numpy, inputs), ddim_steps=2, cfg_scale=1.5).numpy()
        apart.append(np.abs(found.clip(-1, 1) - dense.clip(-1, 1)).mean())
    assert np.mean(apart) == pytest.approx(decision.trials[0].deviation, rel=1e-4)


def test_the_graph_has_an_add_more_for_each_repaired_layer(
    small_policy: CogACT, compiled: CompiledPolicy, tmp_path: Path
) -> None:
    unrepaired = replace(compiled.config, repair="none")
    plan = replace(
        compiled.plan,
        decisions=tuple(d for d in compiled.plan.decisions if not isinstance(d, RepairDecision)),
        tensors={},
        tensor_file=None,
    )
    plain = evla.compile(small_policy, unrepaired, plan=plan, progress=False)
    with_repair, without = (each.report.passes[-1].after for each in (compiled, plain))
    assert with_repair.ops == without.ops  # the bias is an argument of its linear layer: ONNX makes an Add of it
    assert with_repair.weight_bytes - without.weight_bytes == 3 * 32 * 4
    if compiled.config.merge_tokens:
        counts = []
        for name, each in (("repaired", compiled), ("plain", plain)):
            each.export(tmp_path / f"{name}.onnx", progress=False)
            nodes = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph.node
            counts.append(Counter(node.op_type for node in nodes))
        assert counts[0] - counts[1] == Counter({"Add": 3})
        assert not counts[1] - counts[0]


def test_no_repair_is_taken_where_none_helps(
    small_policy: CogACT, frames: list[Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([1.0, 1.5, 1.0, 2.0])
    monkeypatch.setattr(repair_trials, "action_deviation", lambda *_: next(given))
    plan = calibrate(small_policy, frames, CONFIG, progress=False)
    decision = repair_of(plan)
    assert (decision.scope, decision.layers, plan.tensors, plan.tensor_file) == ("none", (), {}, None)
    assert [trial.deviation for trial in decision.trials] == [1.0, 1.5, 1.0, 2.0]


def test_too_few_frames_are_refused_before_the_policy_is_captured(
    small_policy: CogACT, frames: list[Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "capture", lambda *_: pytest.fail("captured"))
    with pytest.raises(
        CalibrationError, match=r"about 40 calibration frames for each .*, 80 in all, .* and these are 24"
    ):
        calibrate(small_policy, frames, replace(CONFIG, repair_frames=40), progress=False)


def test_frames_of_one_task_only_are_fitted_and_another_rare_one_is_named(
    small_policy: CogACT, frames: list[Frame]
) -> None:
    one = repair_of(calibrate(small_policy, frames[:12], CONFIG, progress=False))
    assert one.warnings == ()
    rare = replace(CONFIG, repair_frames=6)
    both = evla.compile(small_policy, rare, calibration=[*frames[:12], *frames[12:14]], progress=False)
    assert len(repair_of(both.plan).warnings) == 1
    assert "warning: 'turn it off': 2 frames, fewer than 6" in str(both.report)


def test_a_plan_with_its_tensors_makes_the_same_policy(
    compiled: CompiledPolicy, small_policy: CogACT, frames: list[Frame], tmp_path: Path
) -> None:
    compiled.plan.save(tmp_path / "plan.json")
    again = evla.compile(small_policy, compiled.config, plan=Plan.load(tmp_path / "plan.json"))
    inputs = [part.numpy() for part in eager_inputs(small_policy, frames[0], 3)]
    samples = [each.outputs(*inputs)["samples"] for each in (compiled, again)]
    assert np.array_equal(samples[0], samples[1])


class InterruptedForTestError(Exception):
    """What stops a calibration here."""


@contextmanager
def stopping(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: int) -> Iterator[None]:
    """Let a method raise when it has been called so often."""
    calls, original = [0], getattr(owner, name)

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise InterruptedForTestError
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(InterruptedForTestError):
            yield


@pytest.mark.parametrize(("owner", "name", "after"), [(GraphWalk, "loaded", 3), (Repair, "_advance", 3)])
def test_an_interrupted_calibration_goes_on_behind_the_last_finished_layer(
    owner: type,
    name: str,
    after: int,
    small_policy: CogACT,
    frames: list[Frame],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = replace(MERGED, repair="all")
    whole = calibrate(small_policy, frames, config, progress=False)
    with stopping(monkeypatch, owner, name, after):
        calibrate(small_policy, frames, config, progress=False, scratch=tmp_path)
    assert (tmp_path / "state.json").is_file()
    counts = {"here": 0}
    count_calls(monkeypatch, GraphWalk, "loaded", counts)
    resumed = calibrate(small_policy, frames, config, progress=False, scratch=tmp_path)
    first = counts["here"]
    assert resumed == whole
    assert list(tmp_path.iterdir()) == []
    counts["here"] = 0
    calibrate(small_policy, frames, config, progress=False)
    assert first < counts["here"] - after + 2


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, counts: dict[str, int]) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def counted(*arguments: Any, **settings: Any) -> Any:
        counts["here"] += 1
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, counted)


def test_what_another_calibration_left_is_not_gone_on_with(
    small_policy: CogACT, frames: list[Frame], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with stopping(monkeypatch, Repair, "_advance", 2):
        calibrate(small_policy, frames, MERGED, progress=False, scratch=tmp_path)
    other = replace(MERGED, repair_rho=1.0)
    found = calibrate(small_policy, frames, other, progress=False, scratch=tmp_path)
    assert found == calibrate(small_policy, frames, other, progress=False)


@pytest.mark.parametrize("text", ["", "{}", '{"key": 1, "steps": {}, "entries": {"a": ["absent"]}}', "[1]"])
def test_a_spoiled_record_begins_anew(text: str, small_policy: CogACT, frames: list[Frame], tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    found = calibrate(small_policy, frames, CONFIG, progress=False, scratch=tmp_path)
    assert found == calibrate(small_policy, frames, CONFIG, progress=False)

"""Layer importance, neuron scores, plans and calibration folders."""

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, fx, nn

import evla_compile as evla
from evla_compile.calibration import calibrate as calibration
from evla_compile.calibration import progress as progress_bar
from evla_compile.calibration.calibrate import calibrate
from evla_compile.calibration.feature_shift import FeatureShift
from evla_compile.calibration.fingerprint import fingerprint_weights
from evla_compile.calibration.streams import Batch
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import copy_graph, get_tensor, replace_tensor
from evla_compile.host.frames import Frame, read_frames
from evla_compile.settings.budgets.layers import LayerDecision, drop_one_by_one, drop_trials, most_important
from evla_compile.settings.budgets.mlp import highest
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, plan_without_calibration
from evla_compile.settings.tolerances import TOLERANCES, check
from tests.paper_config import paper_config


@pytest.fixture(scope="module")
def frames(golden: dict[str, Any], frame: Image.Image) -> list[Frame]:
    return [Frame(frame, case["instruction"]) for case in golden["cases"]]


@pytest.fixture(scope="module")
def plan(tiny_policy: CogACT, frames: list[Frame]) -> Plan:
    return calibrate(tiny_policy, frames, paper_config(keep_layers=4), progress=False)


@pytest.fixture(scope="module")
def small_dense(small_policy: CogACT) -> fx.GraphModule:
    return capture(small_policy, CompileConfig.dense())


def test_importance_equals_the_golden_reference(
    tiny_policy: CogACT, frames: list[Frame], plan: Plan, golden: dict[str, Any], golden_dir: Path
) -> None:
    each = [np.load(golden_dir / case["file"])["layer_importance"] for case in golden["cases"]]
    found = calibrate(tiny_policy, frames[:1], paper_config(keep_layers=4), progress=False)
    check("importance", np.array(found.layer_importance), each[0], tolerance=TOLERANCES.importance)
    check("importance", np.array(plan.layer_importance), np.mean(each, axis=0), tolerance=TOLERANCES.importance)
    assert np.argsort(plan.layer_importance).tolist() == golden["importance_order_ascending"]
    assert plan.keep_layers == tuple(golden["efficient"][0]["kept_layers"])
    assert plan.frames == 3
    assert plan.layer_rule == "importance"
    assert plan.checkpoint == found.checkpoint == fingerprint_weights(tiny_policy.state_dict())
    assert plan.frames_digest != found.frames_digest


def test_greedy_drops_the_layer_without_which_the_cognition_feature_moves_least(
    tiny_policy: CogACT, frames: list[Frame], plan: Plan
) -> None:
    model = tiny_policy.llm_backbone.llm.model
    whole = model.layers

    def features(keep: Sequence[int]) -> Tensor:
        model.layers = torch.nn.ModuleList(whole[index] for index in keep)
        found = []
        for image, instruction in frames:
            ids = torch.tensor([tiny_policy.processor.prompt_ids(instruction)])
            pixels = torch.from_numpy(tiny_policy.processor.image(image))[None]
            with torch.no_grad():
                found.append(tiny_policy.cognition(pixels, ids, torch.tensor([ids.shape[1]])).flatten())
        model.layers = whole
        return torch.stack(found)

    expected, dense = list(range(6)), features(range(6))
    for _ in range(2):
        moved = {}
        for gone in expected:
            found = features([index for index in expected if index != gone])
            moved[gone] = float(((found - dense).norm(dim=1) / dense.norm(dim=1)).mean())
        expected.remove(min(moved, key=lambda gone: moved[gone]))
    chosen = calibrate(tiny_policy, frames, paper_config(keep_layers=4, layer_rule="greedy"), progress=False)
    assert chosen.keep_layers == tuple(expected)
    assert chosen.layer_importance == plan.layer_importance
    assert (chosen.layer_rule, chosen.frames_digest) == ("greedy", plan.frames_digest)
    assert len(chosen.mlp_neurons) == 4


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ([[10, 0], [0, 0.5], [99, 1], [99, 1]], (1, 2, 3)),  # 0.05 against 0.25 relative, 10 against 0.5 absolute
        ([[10, 0.3], [18, 0.1], [99, 1], [99, 1]], (0, 2, 3)),  # 0.2 against 0.14: the first frame alone misleads
        ([[18, 0.1], [5, 0.12], [99, 1], [99, 1]], (0, 2, 3)),  # 0.14 against 0.085: so does the last alone
        ([[20, 0], [15, 0.15], [99, 1], [99, 1]], (1, 2, 3)),  # 0.1 against 0.15: so does the worst
        ([[99, 1], [10, 0.1], [0, 0.2], [20, 0]], (0, 2, 3)),  # the lower index among equals
    ],
)
def test_greedy_measures_each_frame_relative_to_its_own_dense_feature(
    moved: list[list[float]], expected: tuple[int, ...]
) -> None:
    """Features of real policies leave a norm and have one length, so that an absolute distance would rank alike.

    Each row of `moved` says how far two frames move without that layer; their dense features are 100 and 1 long.
    """
    dense = torch.tensor([[100.0, 0.0], [1.0, 0.0]])
    batch = Batch(places=(0, 1), image=torch.zeros(2), input_ids=torch.zeros(2, 1))

    class Run:
        """States are the layers that they went through."""

        def __init__(self) -> None:
            entry = SimpleNamespace(name="start")
            self.layers = [SimpleNamespace(entry=entry, exit=index) for index in range(4)]
            self.readout = "feature"

        def between(self, start: object, first: object, last: object, states: list[Any]) -> list[Any]:
            if last != "feature":
                return [(*states[0], last)]
            shifts = torch.tensor(moved)[[gone for gone in range(4) if gone not in states[0]]].sum(0)
            return [dense + torch.stack([torch.zeros(2), shifts], dim=1)]

    class Start(list[Any]):
        batches = (batch,)

    measured: list[int] = []
    run: Any = Run()
    start: Any = Start([(batch, {"start": ()})])
    shift = FeatureShift(run, start, dense, lambda: measured.append(1))
    assert drop_one_by_one(4, 3, shift) == expected
    assert len(measured) == drop_trials(4, 3) == 4


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_drawn_on_standard_error_where_it_is_wanted(
    progress: bool, small_policy: CogACT, small_dense: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = io.StringIO()

    def new_console(*, stderr: bool) -> Console:
        assert stderr
        return Console(file=drawn, force_terminal=True, width=120)

    monkeypatch.setattr(progress_bar, "new_console", new_console)
    monkeypatch.setattr(calibration, "capture", lambda policy, config: small_dense)
    config = paper_config(keep_layers=3, layer_rule="greedy")
    calibrate(small_policy, [Frame(Image.new("RGB", (4, 4)), "pick")], config, progress=progress)
    shown = drawn.getvalue()
    assert ("Calibrating: decoder" in shown) == ("Dropping layers" in shown) == ("4/4" in shown) == progress
    assert shown.endswith("\x1b[2K") or not progress  # erased at the end


def test_greedy_leaves_named_layers_alone(tiny_policy: CogACT, frames: list[Frame]) -> None:
    config = paper_config(keep_layers=(0, 1, 5), layer_rule="greedy")
    found = calibrate(tiny_policy, frames[:1], config, progress=False)
    assert (found.keep_layers, found.layer_rule) == ((0, 1, 5), None)


def test_neurons_are_those_of_an_eager_count(tiny_policy: CogACT, frames: list[Frame], plan: Plan) -> None:
    activity: dict[int, list[Tensor]] = {}
    downs = {
        index: tiny_policy.get_submodule(f"llm_backbone.llm.model.layers.{index}.mlp.down_proj") for index in range(6)
    }
    hooks = [
        down.register_forward_pre_hook(
            lambda _, given, index=index: activity.setdefault(index, []).append(given[0][0].abs())
        )
        for index, down in downs.items()
    ]
    for image, instruction in frames:
        ids = torch.tensor([tiny_policy.processor.prompt_ids(instruction)])
        pixels = torch.from_numpy(tiny_policy.processor.image(image))[None]
        with torch.no_grad():
            tiny_policy.cognition(pixels, ids, torch.tensor([ids.shape[1]]))
    for hook in hooks:
        hook.remove()
    for layer, kept in zip(plan.keep_layers, plan.mlp_neurons, strict=True):
        score = torch.cat(activity[layer]).mean(0) * downs[layer].get_parameter("weight").norm(dim=0)
        assert kept == tuple(score.topk(128).indices.sort().values.tolist())


def test_equal_neurons_stay_by_the_lower_index() -> None:
    scores = np.array([1, 2, 3, 2, 1, 2], dtype=np.float32)
    assert highest(scores, 3) == (1, 2, 3)
    assert highest(scores, 5) == (0, 1, 2, 3, 5)
    assert highest(np.zeros(1000, dtype=np.float32), 7) == tuple(range(7))


@pytest.mark.parametrize("order", [1, -1])
def test_ranges_are_the_largest_values_of_all_frames(
    order: int, small_policy: CogACT, small_dense: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against hooks on the linear layers of the eager policy."""
    draw = np.random.Generator(np.random.PCG64(0))
    images = [Image.fromarray(draw.integers(0, top, (8, 8, 3), dtype=np.uint8)) for top in (20, 256, 90)][::order]
    each: list[dict[str, float]] = []

    def note(module: nn.Module, given: tuple[Tensor], returned: Tensor) -> None:
        each[-1][names[module]] = max(given[0].abs().max().item(), returned.abs().max().item())

    names: dict[nn.Module, str] = {
        module: name
        for name, module in small_policy.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("action_model")
    }
    hooks = [module.register_forward_hook(note) for module in names]
    for image in images:
        ids = torch.tensor([small_policy.processor.prompt_ids("pick")])
        each.append({})
        with torch.no_grad():
            pixels = torch.from_numpy(small_policy.processor.image(image))[None]
            small_policy.cognition(pixels, ids, torch.tensor([ids.shape[1]]))
    for hook in hooks:
        hook.remove()
    expected = {name: max(values[name] for values in each) for name in each[0]}
    assert all(any(values[name] < expected[name] for name in expected) for values in each), "one frame has it all"
    frames = [Frame(image, "pick") for image in images]
    monkeypatch.setattr(calibration, "capture", lambda policy, config: small_dense)
    found = dict(calibrate(small_policy, frames, CompileConfig.dense(), progress=False).ranges)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_values_that_overflow_are_refused_by_the_name_of_their_layer(
    small_policy: CogACT, small_dense: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are finite, their products are not."""
    graph = copy_graph(small_dense)
    for name in ("gate_proj", "up_proj"):
        weight = f"llm_backbone.llm.model.layers.2.mlp.{name}.weight"
        replace_tensor(graph, weight, get_tensor(graph, weight) * 1e30)
    monkeypatch.setattr(calibration, "capture", lambda policy, config: graph)
    with pytest.raises(evla.CalibrationError, match=r"layers\.2\.mlp\S* yields (inf|nan) on a calibration frame"):
        calibrate(small_policy, [Frame(Image.new("RGB", (4, 4)), "pick")], CompileConfig.dense(), progress=False)


def test_all_budgets_open_keep_everything(tiny_policy: CogACT, frames: list[Frame]) -> None:
    found = calibrate(tiny_policy, frames[:1], CompileConfig.dense(), progress=False)
    assert found.keep_layers == (0, 1, 2, 3, 4, 5)
    assert found.mlp_neurons == ()
    assert found.layer_rule is None


def test_importance_ranks_and_the_lower_index_goes_first_among_equals() -> None:
    assert most_important((0.5, 0.1, 0.1, 0.1), 2) == (0, 3)


def test_plan_survives_json(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert hash(plan) == hash(Plan.load(tmp_path / "plan.json"))


def test_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(evla.CalibrationError, match="No such file"):
        Plan.load(tmp_path / "plan.json")


def test_no_frames_are_refused(tiny_policy: CogACT) -> None:
    with pytest.raises(evla.CalibrationError, match="at least one real"):
        calibrate(tiny_policy, [], paper_config(keep_layers=4), progress=False)


@pytest.mark.parametrize("config", [paper_config(keep_layers=4, mlp_keep=1.0), paper_config(keep_layers=None)])
def test_a_reduced_budget_is_never_calibrated_on_made_up_data(config: CompileConfig, tiny_policy: CogACT) -> None:
    with pytest.raises(evla.CalibrationError, match="give calibration= frames"):
        plan_without_calibration(tiny_policy.sizes, config)


def test_named_layers_need_no_calibration(tiny_policy: CogACT) -> None:
    found = plan_without_calibration(tiny_policy.sizes, paper_config(keep_layers=(0, 2, 5), mlp_keep=1.0))
    assert found == Plan(decisions=(LayerDecision(keep=(0, 2, 5)),))


@pytest.fixture
def folder(tmp_path: Path, frame: Image.Image) -> Path:
    frame.save(tmp_path / "0.png")
    (tmp_path / "frames.jsonl").write_text('{"image": "0.png", "instruction": "pick coke can"}\n\n')
    return tmp_path


def test_calibration_folder_is_read(folder: Path, frame: Image.Image) -> None:
    (found,) = read_frames(folder)
    image, instruction = found
    assert found.episode is None
    assert instruction == "pick coke can"
    assert np.array_equal(np.asarray(image), np.asarray(frame))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("not json", r"frames\.jsonl:1: not JSON"),
        ('{"image": "0.png"}', r"frames\.jsonl:1: expected"),
        ('["0.png", "pick"]', r"frames\.jsonl:1: expected"),
        ('{"image": "0.png", "instruction": ""}', r"frames\.jsonl:1: expected"),
        ('{"image": "1.png", "instruction": "pick"}', r"frames\.jsonl:1: image .*1\.png cannot be read"),
        ('{"image": "grey.png", "instruction": "pick"}', r"frames\.jsonl:1: image .*grey\.png is greyscale"),
        ('{"image": "cut.png", "instruction": "pick"}', r"frames\.jsonl:1: image .*cut\.png cannot be read"),
        ('{"image": "0.png", "instruction": "pick \\ud83d"}', r"frames\.jsonl:1: instruction .*half of a character"),
        ('{"image": "0.png", "instruction": "pick", "episode": ""}', r'frames\.jsonl:1: "episode" is \'\', expected'),
        ('{"image": "0.png", "instruction": "pick", "episode": 1.5}', r'frames\.jsonl:1: "episode" is 1\.5, expected'),
        ("[" * 100_000, r"frames\.jsonl:1: not JSON"),
    ],
)
def test_malformed_calibration_folder_is_refused(text: str, message: str, folder: Path) -> None:
    Image.new("L", (4, 4)).save(folder / "grey.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:5000])
    (folder / "frames.jsonl").write_text(text)
    with pytest.raises(evla.CalibrationError, match=message):
        read_frames(folder)


def test_missing_calibration_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(evla.CalibrationError, match=r"frames\.jsonl cannot be read"):
        read_frames(tmp_path / "nowhere")

"""Deferred weights: a recipe that behaves like its value."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import evla_compile as evla
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.graph.contract import weights
from evla_compile.graph.deferred import DeferredWeight, cut, materialized
from evla_compile.settings.plan import stand_in_plan
from tests.paper_config import paper_config

KEPT = torch.tensor([0, 3, 4])
BUDGETS = paper_config(keep_layers=5, visual_tokens=20)


@pytest.fixture
def stored() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def test_it_has_the_form_of_its_value(stored: Tensor) -> None:
    weight = DeferredWeight(stored, dtype=torch.float32, dim=1, kept=KEPT)
    value = materialized(weight)
    assert (weight.shape, weight.dtype, weight.device) == (value.shape, value.dtype, value.device)
    assert weight.shape == (6, 3)
    assert type(value) is Tensor
    assert torch.equal(value, stored[:, KEPT].float())


@pytest.mark.parametrize("dim", [0, 1])
def test_cuts_and_casts_combine(stored: Tensor, dim: int) -> None:
    cast = DeferredWeight(stored, dtype=torch.float32)
    expected = stored.float().index_select(dim, KEPT)
    assert torch.equal(materialized(cut(cast, dim, KEPT)), expected)
    assert torch.equal(materialized(cut(stored, dim, KEPT)), stored.index_select(dim, KEPT))
    again = cut(cut(cast, dim, KEPT), 1 - dim, torch.tensor([1]))
    assert torch.equal(materialized(again), expected.index_select(1 - dim, torch.tensor([1])))


def test_a_plain_tensor_is_its_own_value(stored: Tensor) -> None:
    assert materialized(stored) is stored


def test_operators_read_the_value_and_return_plain_tensors(stored: Tensor) -> None:
    weight = DeferredWeight(stored, dtype=torch.float32)
    x = torch.randn(2, 5)
    for found in (functional.linear(x, weight), torch.ops.aten.linear.default(x, weight)):
        assert type(found) is Tensor
        assert torch.equal(found, functional.linear(x, stored.float()))
    assert torch.equal(functional.embedding(KEPT, weight), stored.float()[KEPT])


def test_nothing_is_computed_before_it_is_read(stored: Tensor) -> None:
    weight = cut(stored, 0, KEPT)
    stored.fill_(2.0)
    assert torch.equal(weight + 0, torch.full((3, 5), 2.0, dtype=torch.bfloat16))


def test_what_is_written_into_it_is_kept_and_reaches_its_aliases_and_not_the_source(stored: Tensor) -> None:
    source = stored.clone()
    weight = DeferredWeight(stored, dtype=torch.float32, dim=1, kept=KEPT)
    before = materialized(weight)
    alias, view = weight.detach(), weight.T
    assert weight.mul_(2.0) is weight
    alias.data.add_(1.0)
    for found in (weight, alias, view.T):
        assert torch.equal(materialized(found), 2.0 * before + 1.0)
    weight.copy_(torch.ones(6, 3))
    torch._foreach_add_([weight, alias], 1.0)
    assert torch.equal(alias + 0, torch.full((6, 3), 3.0))
    assert torch.equal(stored, source)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight[0].add_(1.0),
        lambda weight: weight.data[1:3].copy_(torch.zeros(2, 5)),
        lambda weight: weight.T.mul_(2.0),
        lambda weight: weight.view(-1).zero_(),
        lambda weight: weight.detach()[:, None].fill_(0.0),
        lambda weight: weight.__setitem__((0, 1), 3.0),
        lambda weight: torch.add(torch.ones(5), 1.0, out=weight[0]),
        lambda weight: weight.chunk(2)[1].zero_(),
        lambda weight: weight.split(2)[0].zero_(),
        lambda weight: weight.split([2, 4])[1].zero_(),
        lambda weight: weight.tensor_split(4)[3].zero_(),
        lambda weight: weight.unsafe_chunk(2)[0].zero_(),
        lambda weight: weight.unsafe_split(2)[0].zero_(),
        lambda weight: weight.unsafe_split_with_sizes([2, 4])[1].zero_(),
        lambda weight: weight.unbind(1)[2].zero_(),
        lambda weight: [row.zero_() for row in weight],
        lambda weight: weight.unfold(0, 2, 2).zero_(),
        lambda weight: weight.view(torch.int32).zero_(),
        lambda weight: weight.squeeze().zero_(),
        lambda weight: weight[None, :, None].squeeze((0, 2)).zero_(),
        lambda weight: weight.view(3, 2, 5).movedim(0, 1).zero_(),
        lambda weight: torch.view_as_complex(weight.view(3, 5, 2)).zero_(),
        lambda weight: torch._foreach_zero_(list(weight.chunk(2))),
    ],
)
def test_writing_into_a_view_of_it_is_an_error(stored: Tensor, write: Callable[[Tensor], object]) -> None:
    weight = DeferredWeight(stored, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"writes into a view of a deferred weight.*without deferred=True"):
        write(weight)
    assert torch.equal(materialized(weight), stored.float())


def test_a_view_of_it_is_computed_when_it_is_read(stored: Tensor) -> None:
    weight = DeferredWeight(stored, dtype=torch.float32)
    view = weight.T[1:, None]
    expected = stored.float().T[1:, None]
    assert (view.shape, view.stride(), view.dtype) == (expected.shape, expected.stride(), torch.float32)
    assert torch.equal(materialized(view), expected)
    assert torch.equal(materialized(cut(view, 2, KEPT)), expected[:, :, KEPT])
    assert type(view + 0) is Tensor
    assert torch.equal(view + 0, expected)


def test_each_of_several_views_of_it_is_computed_when_it_is_read(stored: Tensor) -> None:
    weight = DeferredWeight(stored, dtype=torch.float32)
    parts, rows = torch.split(weight, [2, 4]), list(weight)
    weight.mul_(2.0)
    changed = 2.0 * stored.float()
    for found, expected in zip((*parts, *rows), (*torch.split(changed, [2, 4]), *changed), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), torch.float32)
        assert torch.equal(materialized(found), expected)
    assert torch.equal(materialized(parts[1].chunk(2)[1]), changed[4:])
    assert torch.equal(materialized(weight.view(torch.int32)), changed.view(torch.int32))


def test_inference_mode_changes_neither_what_is_a_view_of_it_nor_what_is_a_copy(stored: Tensor) -> None:
    with torch.inference_mode():
        weight = DeferredWeight(stored, dtype=torch.float32)
        for part in (*weight.chunk(2), weight.reshape(-1)):
            with pytest.raises(TypeError, match="writes into a view"):
                part.zero_()
        for copied in (weight.to(torch.float64), weight.T.contiguous(), weight.T.reshape(-1)):
            assert type(copied) is Tensor
        assert weight.to("meta").is_meta
        assert weight.contiguous() is weight
        assert torch.equal(weight + 0, stored.float())


@pytest.mark.parametrize("written", [False, True])
def test_a_copy_of_a_module_that_holds_it_is_its_own(stored: Tensor, written: bool) -> None:
    layer = nn.Linear(5, 6, bias=False, device="meta").requires_grad_(False)
    layer.load_state_dict({"weight": DeferredWeight(stored, dtype=torch.float32)}, assign=True)
    if written:
        layer.weight.add_(1.0)
    copied, before = deepcopy(layer), materialized(layer.weight).clone()
    assert isinstance(copied.weight, DeferredWeight)
    assert isinstance(copied.weight, nn.Parameter)
    assert not copied.weight.requires_grad
    copied.weight.mul_(2.0)
    assert torch.equal(materialized(copied.weight), 2.0 * before)
    assert torch.equal(materialized(layer.weight), before)
    assert torch.equal(deepcopy(layer.weight.T), before.T)


def test_a_module_holds_it_as_a_parameter_and_hands_it_on(stored: Tensor) -> None:
    layer = nn.Linear(5, 6, bias=False, device="meta").requires_grad_(False)
    layer.load_state_dict({"weight": DeferredWeight(stored, dtype=torch.float32)}, assign=True)
    assert isinstance(layer.weight, DeferredWeight)
    assert isinstance(layer.state_dict()["weight"], DeferredWeight)
    assert torch.equal(layer(torch.eye(5)), stored.float().T)


@pytest.fixture(scope="module")
def bfloat16_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with its tensors stored as bfloat16."""
    run = tmp_path_factory.mktemp("bfloat16") / "run"
    (run / "checkpoints").mkdir(parents=True)
    for file in tiny_checkpoint.iterdir():
        if file.is_file():
            (run / file.name).write_bytes(file.read_bytes())
    (source,) = (tiny_checkpoint / "checkpoints").iterdir()
    contents = deepcopy(torch.load(source, weights_only=True))
    for group in contents["model"].values():
        group.update({key: tensor.to(torch.bfloat16) for key, tensor in group.items()})
    torch.save(contents, run / "checkpoints" / source.name)
    return run


def test_a_policy_loaded_deferred_equals_one_that_was_cast(bfloat16_checkpoint: Path) -> None:
    cast, deferred = load(bfloat16_checkpoint), load(bfloat16_checkpoint, deferred=True)
    name = "llm_backbone.llm.model.layers.0.mlp.up_proj.weight"
    assert isinstance(deferred.get_parameter(name), DeferredWeight)
    assert torch.equal(materialized(deferred.get_parameter(name)), cast.get_parameter(name))
    plan = stand_in_plan(cast.sizes, BUDGETS)
    first, second = (evla.compile(policy, BUDGETS, plan=plan) for policy in (cast, deferred))
    assert first.report.passes[-1].after == second.report.passes[-1].after
    inputs = (
        torch.zeros(1, 224, 224, 3, dtype=torch.uint8).numpy(),
        torch.ones(1, 32, dtype=torch.int64).numpy(),
        torch.tensor([20]).numpy(),
        torch.zeros(1, 16, 7).numpy(),
    )
    expected = first.outputs(*inputs)["samples"]
    assert (second.outputs(*inputs)["samples"] == expected).all()
    assert any(isinstance(tensor, DeferredWeight) for _, tensor in weights(second.graph))
    assert (second.sample(*inputs) == expected).all()
    assert not any(isinstance(tensor, DeferredWeight) for _, tensor in weights(second.graph))


def test_a_deferred_policy_takes_a_state_dict_and_a_merged_lora(bfloat16_checkpoint: Path) -> None:
    (file,) = (bfloat16_checkpoint / "checkpoints").iterdir()
    stored, policy = file.read_bytes(), load(bfloat16_checkpoint, deferred=True)
    doubled = {name: 2.0 * materialized(tensor) for name, tensor in policy.state_dict().items()}
    policy.load_state_dict(doubled)
    name = "llm_backbone.llm.model.layers.0.self_attn.q_proj.weight"
    weight = policy.get_parameter(name)
    a, b = torch.ones(2, weight.shape[1]), torch.ones(weight.shape[0], 2)
    with torch.no_grad():
        weight.add_(0.5 * (b @ a))
    doubled[name] += 1.0
    for name, tensor in policy.state_dict().items():
        assert torch.equal(materialized(tensor), doubled[name]), name
    assert file.read_bytes() == stored


def test_deferred_weights_stay_on_the_cpu(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="deferred=True with device='meta'"):
        load(tiny_checkpoint, deferred=True, device="meta")


def test_a_cast_that_does_not_fit_into_memory_is_refused(
    bfloat16_checkpoint: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evla_compile.families.cogact.loading.checkpoint.available_memory", lambda: 1_000_000)
    with pytest.raises(evla.EvlaError, match=r"needs [0-9.]+ MB of memory, 1\.0 MB are free: .*deferred=True"):
        load(bfloat16_checkpoint)
    load(bfloat16_checkpoint, deferred=True)
    load(tiny_checkpoint)  # stored as float32: nothing is cast

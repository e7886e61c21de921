"""The repair of a language model, on a Llama of four layers with grouped heads and random weights."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import repair_language_model as benchmark
from benchmarks.layer_redundancy import perplexity
from benchmarks.repair_language_model import (
    LanguageRepair,
    best_repair,
    capture_language_model,
    fitted_of,
    held_out_of,
    prompts_of,
    write_text,
)
from evla_compile.calibration.progress import drawing_progress
from evla_compile.graph.contract import weights
from evla_compile.passes import PruneLayers, PruneMLP, RepairLayers
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.budgets.mlp import highest

WIDTH, NEURONS, RHO = 24, 32, 0.1


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train(False).requires_grad_(False)


@pytest.fixture(scope="module")
def written(model: Any) -> Tensor:
    """Text of the model's own, [40,16]."""
    return write(model)


def write(model: Any) -> Tensor:
    prompts = prompts_of([torch.arange(100)[None] % 64, torch.arange(20)[None]], 40)
    with pytest.MonkeyPatch.context() as patch, drawing_progress(wanted=False) as bar:
        patch.setattr(benchmark, "WINDOW", 16)
        return write_text(model, prompts, bar)


@pytest.fixture(scope="module")
def windows(written: Tensor) -> Tensor:
    return fitted_of(written)


@pytest.fixture(scope="module")
def graph(model: Any, windows: Tensor) -> fx.GraphModule:
    return capture_language_model(model, windows[:1])


@pytest.fixture(scope="module")
def repair(graph: fx.GraphModule, windows: Tensor) -> LanguageRepair:
    return LanguageRepair(graph, windows)


def lstsq(x: NDArray[np.float64], y: NDArray[np.float64], *blocks: int) -> tuple[NDArray[np.float64], ...]:
    """Solve the ridge regression of y on x, means removed, as one augmented least-squares problem."""
    scale = np.ones(x.shape[1])
    for first, last in pairwise(np.cumsum((0, *blocks))):
        scale[first:last] = np.sqrt(np.mean(x[:, first:last] ** 2))
    a, b = x / scale, y - y.mean(axis=0)
    mean = a.mean(axis=0)
    a = a - mean
    penalty = np.sqrt(RHO * np.mean(np.sum(a**2, axis=0))) * np.eye(a.shape[1])
    found = np.linalg.lstsq(np.vstack([a, penalty]), np.vstack([b, np.zeros((a.shape[1], b.shape[1]))]))[0]
    return found.T / scale, y.mean(axis=0) - found.T @ mean


def inside(model: Any, layer: int, windows: Tensor) -> dict[str, Tensor]:
    """Return what enters a layer's output and down projections, its residual stream and what leaves it, [N,...]."""
    seen: dict[str, Tensor] = {}
    block = model.model.layers[layer]
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, given[0]))
        for name, module in (
            ("context", block.self_attn.o_proj),
            ("neurons", block.mlp.down_proj),
            ("attended", block.post_attention_layernorm),
        )
    ]
    hooks.append(block.register_forward_hook(lambda _, given, out: seen.__setitem__("left", out)))
    model(windows)
    for hook in hooks:
        hook.remove()
    return {name: tensor.flatten(0, 1).double() for name, tensor in seen.items()}


def test_a_refit_layer_equals_least_squares_by_hand(
    model: Any, graph: fx.GraphModule, repair: LanguageRepair, windows: Tensor
) -> None:
    pruned, _ = PruneLayers(keep=(0, 1, 3))(graph)
    found = repair.tensors(pruned, [RHO])[RHO]
    at, target = inside(model, 1, windows), inside(model, 2, windows)["left"]
    block = model.model.layers[1]
    output, down = block.self_attn.o_proj.weight.double(), block.mlp.down_proj.weight.double()
    residual = target - at["attended"] - at["neurons"] @ down.T
    joint, _ = lstsq(torch.cat([at["context"], at["neurons"]], dim=1).numpy(), residual.numpy(), WIDTH, NEURONS)
    change = torch.from_numpy(joint[:, :WIDTH])
    attended = at["attended"] + at["context"] @ change.T
    normed = block.post_attention_layernorm(attended.float())
    neurons = (block.mlp.act_fn(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed)).double()
    moved, bias = lstsq(neurons.numpy(), (target - attended - neurons @ down.T).numpy())
    path = f"{COGACT.decoder_layers}.1"
    for name, expected in (
        ("self_attn.o_proj.weight", output + change),
        ("mlp.down_proj.weight", down + torch.from_numpy(moved)),
        ("mlp.down_proj.bias", torch.from_numpy(bias)),
    ):
        torch.testing.assert_close(found[f"{path}.{name}"].double(), expected, rtol=1e-4, atol=1e-5)
    assert change.norm() > 0.01 * output.norm()


@pytest.mark.parametrize("narrow", [False, True])
def test_it_brings_the_logits_nearer_to_the_whole_models(
    graph: fx.GraphModule, repair: LanguageRepair, windows: Tensor, narrow: bool
) -> None:
    keep = (0, 1, 2, 3) if narrow else (0, 1, 3)
    compressed, _ = PruneLayers(keep=keep)(graph)
    if narrow:
        chosen = tuple((layer, highest(repair.neuron_scores[layer], NEURONS // 2)) for layer in keep)
        compressed, _ = PruneMLP(neurons=chosen)(compressed)
    repaired, report = RepairLayers(layers=keep, tensors=repair.tensors(compressed, [RHO])[RHO])(compressed)
    assert report.changes == len(keep)

    def apart(other: fx.GraphModule) -> float:
        return sum(float((other(ids[None]) - graph(ids[None])).square().mean()) for ids in windows)

    assert apart(repaired) < 0.8 * apart(compressed)


def test_where_nothing_is_missing_nothing_changes(graph: fx.GraphModule, repair: LanguageRepair) -> None:
    before = dict(weights(graph))
    for name, tensor in repair.tensors(graph, [RHO])[RHO].items():
        expected = torch.zeros(WIDTH) if name.endswith("bias") else before[name]
        torch.testing.assert_close(tensor, expected, rtol=0.0, atol=1e-5)


def test_the_windows_given_decide_and_no_repair_may_be_best(
    graph: fx.GraphModule, repair: LanguageRepair, windows: Tensor
) -> None:
    pruned, _ = PruneLayers(keep=(0, 1, 3))(graph)
    tensors = repair.tensors(pruned, [RHO])[RHO]
    harmful = {name: -3.0 * tensor for name, tensor in tensors.items()}
    deciding = list(windows[:, None])  # random weights have learnt nothing that other windows would share
    best, rho, found = best_repair(pruned, {1.0: harmful}, deciding)
    assert (rho, best) == (0.0, pruned)
    assert found[0.0] == perplexity(pruned, deciding) < found[1.0]
    best, rho, again = best_repair(pruned, {1.0: harmful, RHO: tensors}, deciding)
    assert rho == RHO
    assert perplexity(best, deciding) == again[RHO] < found[0.0]
    assert again[1.0] == found[1.0]


def test_the_model_writes_the_same_text_again_and_part_of_it_is_not_fitted_on(model: Any, written: Tensor) -> None:
    state = torch.get_rng_state()
    assert torch.equal(write(model), written)
    assert torch.equal(torch.get_rng_state(), state)
    assert written.shape == (40, 16)
    held_out = held_out_of(written)
    assert (len(held_out), len(fitted_of(written))) == (8, 32)
    assert torch.equal(torch.cat(held_out), written[4::5])
    assert not any(torch.equal(ids[0], fitted) for ids in held_out for fitted in fitted_of(written))


def test_prompts_are_spread_over_the_whole_text() -> None:
    prompts = prompts_of([torch.arange(100)[None], torch.arange(100, 128)[None]], 3)
    assert prompts.shape == (3, benchmark.PROMPT)
    assert prompts[:, 0].tolist() == [0, 32, 64]
    assert int(prompts[-1, -1]) == 127

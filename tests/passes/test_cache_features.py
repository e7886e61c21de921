"""`CacheFeatures` against the paper's caching, block by block."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, fx

from evla_compile.errors import PassError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import copy_graph, inserting, measure, propagate
from evla_compile.graph.flops import product_flops
from evla_compile.graph.sites import argument, is_call, module_path, nodes_under
from evla_compile.passes import CacheFeatures, UnrollDiffusion
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.schedule import ddim_schedule
from evla_compile.settings.tolerances import TOLERANCES, relative_error

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def uniform(interval: int, of: int = 5) -> tuple[int, ...]:
    return tuple(range(0, of, interval))


def sample_by_hand(
    policy: CogACT, inputs: Inputs, *, of: int, steps: tuple[int, ...], cfg_scale: float, extrapolate: bool = False
) -> Tensor:
    """Cache the attention and MLP outputs of every block by themselves, condition token included, as the paper does.

    Extrapolated is each of them, on the line through its values at the last two computed steps.
    """
    *observation, x = inputs
    net = policy.action_model.net
    z = policy.cognition(*observation)
    batch, guided = len(x), cfg_scale > 1
    if guided:
        z = torch.cat([z, net.z_embedder.uncondition[None].expand(batch, -1, -1)])
    cache: dict[tuple[int, str], dict[int, Tensor]] = defaultdict(dict)

    def reused(values: dict[int, Tensor], number: int) -> Tensor:
        *_, last = values
        if not extrapolate or len(values) == 1:
            return values[last]
        before = list(values)[-2]
        share = (number - before) / (last - before)
        return (1 - share) * values[before] + share * values[last]

    for number, step in enumerate(ddim_schedule(of)):
        condition = net.z_embedder(z) + net.t_embedder(torch.tensor([float(step.timestep)]))[:, None]
        tokens = net.x_embedder(torch.cat([x, x]) if guided else x)
        hidden = torch.cat([condition, tokens], dim=1) + net.positional_embedding
        for depth, block in enumerate(net.blocks):
            if number in steps:
                attention = block.attn(block.norm1(hidden))  # type: ignore[operator]  # a submodule
                mlp = block.mlp(block.norm2(hidden + attention))  # type: ignore[operator]  # a submodule
                cache[depth, "attention"][number], cache[depth, "mlp"][number] = attention, mlp
            else:
                attention, mlp = (reused(cache[depth, part], number) for part in ("attention", "mlp"))
            hidden = hidden + attention + mlp
        noise = net.final_layer(hidden)[:, 1:]
        if guided:
            noise = noise[batch:] + cfg_scale * (noise[:batch] - noise[batch:])
        x = step.sample * x + step.noise * noise
    return x


@pytest.mark.parametrize("interval", [2, 3, 4, 5, 100])  # 2, 3 and 4 do not divide the five steps
def test_it_equals_caching_by_hand(
    small_policy: CogACT, small_sampler: fx.GraphModule, small_inputs: Inputs, interval: int
) -> None:
    cached, report = CacheFeatures(steps=uniform(interval))(small_sampler)
    expected = sample_by_hand(small_policy, small_inputs, of=5, steps=uniform(interval), cfg_scale=1.5)
    assert relative_error(cached(*small_inputs).numpy(), expected.numpy()) <= TOLERANCES.samples
    assert (report.changes, report.exact) == (5 - len(uniform(interval)), False)


@pytest.mark.parametrize("extrapolate", [False, True])
@pytest.mark.parametrize("steps", [(0,), (0, 2), (0, 4), (0, 1, 3), (0, 2, 3), (0, 3, 4)])
def test_any_steps_equal_caching_by_hand(
    small_policy: CogACT, small_sampler: fx.GraphModule, small_inputs: Inputs, steps: tuple[int, ...], extrapolate: bool
) -> None:
    cached, report = CacheFeatures(steps=steps, extrapolate=extrapolate)(small_sampler)
    expected = sample_by_hand(small_policy, small_inputs, of=5, steps=steps, cfg_scale=1.5, extrapolate=extrapolate)
    assert relative_error(cached(*small_inputs).numpy(), expected.numpy()) <= TOLERANCES.samples
    assert report.changes == 5 - len(steps)


def test_extrapolated_steps_share_a_difference_and_have_one_multiply_add_more(
    small_graph: fx.GraphModule,
) -> None:
    sampler, _ = UnrollDiffusion(ddim_steps=8)(small_graph)
    plain, extrapolated = (
        CacheFeatures(steps=(0, 2, 5), extrapolate=extrapolate)(sampler)[0] for extrapolate in (False, True)
    )
    added = {}
    for step in range(8):
        before, after = (
            Counter(n.target for n in nodes_under(gm.graph, f"{COGACT.denoising}.{step}"))
            for gm in (plain, extrapolated)
        )
        assert not before - after
        added[step] = dict(after - before)
    once = {aten.mul.Tensor: 1, aten.add.Tensor: 1}
    difference = {aten.sub.Tensor: 1}
    assert added == {0: {}, 1: {}, 2: difference, 3: once, 4: once, 5: difference, 6: once, 7: once}
    assert measure(extrapolated).weight_bytes == measure(plain).weight_bytes


def test_before_a_second_computed_step_nothing_is_extrapolated(small_sampler: fx.GraphModule) -> None:
    plain, extrapolated = (
        CacheFeatures(steps=(0, 4), extrapolate=extrapolate)(small_sampler)[0] for extrapolate in (False, True)
    )
    assert str(plain.graph) == str(extrapolated.graph)


def test_it_equals_caching_by_hand_without_guidance(
    small_policy: CogACT, small_unguided_graph: fx.GraphModule, small_inputs: Inputs
) -> None:
    cached, _ = CacheFeatures(steps=uniform(3))(UnrollDiffusion(ddim_steps=5)(small_unguided_graph)[0])
    expected = sample_by_hand(small_policy, small_inputs, of=5, steps=uniform(3), cfg_scale=1.0)
    assert relative_error(cached(*small_inputs).numpy(), expected.numpy()) <= TOLERANCES.samples


def test_a_reused_step_embeds_the_actions_adds_the_cache_and_reads_the_noise_out(small_sampler: fx.GraphModule) -> None:
    cached, _ = CacheFeatures(steps=uniform(2))(small_sampler)
    net = f"{COGACT.denoising}.1.{COGACT.action_model}.net"
    operators = Counter(
        (module_path(n).removeprefix(net), n.target) for n in nodes_under(cached.graph, f"{COGACT.denoising}.1")
    )
    assert operators == {
        (".x_embedder.linear", aten.linear.default): 1,
        ("", aten.add.Tensor): 2,  # positional embedding; guidance
        ("", aten.cat.default): 1,  # both guidance halves
        (f"{COGACT.denoising}.1", aten.add.Tensor): 2,  # the cached features; the sampler
        (".final_layer.norm_final", aten.layer_norm.default): 1,
        (".final_layer.linear", aten.linear.default): 1,
        ("", aten.slice.Tensor): 2,  # the guidance halves
        ("", aten.sub.Tensor): 1,
        ("", aten.mul.Tensor): 1,
        (f"{COGACT.denoising}.1", aten.mul.Tensor): 2,
    }


def test_a_computed_step_keeps_its_operators_and_adds_one_difference(small_sampler: fx.GraphModule) -> None:
    cached, _ = CacheFeatures(steps=uniform(2))(small_sampler)
    for step, added in (("0", {aten.sub.Tensor: 1}), ("2", {aten.sub.Tensor: 1}), ("4", {})):
        before, after = (
            Counter(n.target for n in nodes_under(gm.graph, f"{COGACT.denoising}.{step}"))
            for gm in (small_sampler, cached)
        )
        assert after - before == added  # nothing reuses the last step
        assert not before - after


def test_attention_and_weights_of_reused_steps_are_gone(small_sampler: fx.GraphModule) -> None:
    cached, report = CacheFeatures(steps=uniform(2))(small_sampler)
    attention = [
        n for n in nodes_under(cached.graph, COGACT.denoising) if is_call(n, aten.scaled_dot_product_attention.default)
    ]
    assert len(attention) == 3 * 2  # computed steps, blocks
    timesteps = {str(n.target) for n in cached.graph.find_nodes(op="get_attr") if "timestep" in str(n.target)}
    assert len(timesteps) == 3
    assert report.before.weight_bytes - report.after.weight_bytes == 2 * 4  # the timesteps of the reused steps
    rows, tokens, width, mlp = 4, 6, 20, 44
    block = 2 * rows * tokens * (4 * width**2 + 2 * width * mlp) + 4 * rows * tokens**2 * width
    time = 2 * (18 * width + width * width)
    before, after = (sum(map(product_flops, gm.graph.nodes)) for gm in (small_sampler, cached))
    assert before - after == 2 * (2 * block + time)
    linears, norms, gelus = block - 4 * rows * tokens**2 * width, 2 * 4 * rows * tokens * width, rows * tokens * mlp
    assert report.before.paper_flops - report.after.paper_flops == 2 * (2 * (linears + norms + gelus) + time)


def test_the_input_graph_is_untouched(
    small_sampler: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_sampler):
        CacheFeatures(steps=uniform(3))(small_sampler)


def test_computing_every_step_changes_nothing(small_sampler: fx.GraphModule) -> None:
    same, report = CacheFeatures(steps=uniform(1))(small_sampler)
    assert report.changes == 0
    assert str(same.graph) == str(small_sampler.graph)


def test_a_sampler_that_is_not_unrolled_is_refused(small_graph: fx.GraphModule) -> None:
    with pytest.raises(PassError, match="no unrolled denoising step in the graph: run UnrollDiffusion first"):
        CacheFeatures(steps=uniform(2))(small_graph)


def test_a_cached_sampler_is_refused(small_sampler: fx.GraphModule) -> None:
    cached, _ = CacheFeatures(steps=uniform(2))(small_sampler)
    with pytest.raises(PassError, match=r"no DiT block under 'denoising\.1\..*': its features are cached already"):
        CacheFeatures(steps=uniform(3))(cached)


def test_where_the_final_layer_reads_the_condition_token_all_tokens_are_cached(
    small_policy: CogACT, late_sampler: fx.GraphModule, small_inputs: Inputs
) -> None:
    cached, report = CacheFeatures(steps=uniform(3))(late_sampler)
    expected = sample_by_hand(small_policy, small_inputs, of=5, steps=uniform(3), cfg_scale=1.5)
    assert relative_error(cached(*small_inputs).numpy(), expected.numpy()) <= TOLERANCES.samples
    assert report.changes == 3
    net = f"{COGACT.denoising}.1.{COGACT.action_model}.net"
    (norm,) = nodes_under(cached.graph, f"{net}.final_layer.norm_final")
    assert norm.meta["val"].shape == (4, 6, 20)
    assert nodes_under(cached.graph, f"{net}.t_embedder")  # the condition token is alive
    assert not nodes_under(cached.graph, f"{net}.blocks")


@pytest.fixture
def late_sampler(small_sampler: fx.GraphModule) -> fx.GraphModule:
    """The small sampler with its condition token dropped behind the final layer, as upstream does."""
    late = copy_graph(small_sampler)
    for step in range(5):
        net = f"{COGACT.denoising}.{step}.{COGACT.action_model}.net"
        (norm,) = nodes_under(late.graph, f"{net}.final_layer.norm_final")
        (linear,) = nodes_under(late.graph, f"{net}.final_layer.linear")
        dropping = argument(norm, 0)
        with inserting(late.graph, linear.next, net) as proxy:
            dropped = aten.slice.Tensor(proxy(linear), 1, 1).node
        for user in set(linear.users) - {dropped}:
            user.replace_input_with(linear, dropped)
        dropping.replace_all_uses_with(argument(dropping, 0))
        late.graph.erase_node(dropping)
        for node in (norm, linear):
            del node.meta["val"]
    propagate(late)
    return late


@pytest.mark.parametrize("steps", [(), (1, 3), (0, 3, 3), (0, 4, 2), (0, -1)])
def test_steps_that_do_not_ascend_from_0_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"steps={steps}: expected ascending denoising steps from 0")):
        CacheFeatures(steps=steps)


def test_steps_that_the_sampler_lacks_are_refused(small_sampler: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=re.escape("the sampler has no steps [5, 7]; it has 0 to 4")):
        CacheFeatures(steps=(0, 3, 5, 7))(small_sampler)

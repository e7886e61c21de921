"""Half precision in explicit casts: the oracle is the eager policy with its matrix products rounded by hand."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from evla_compile.errors import PassError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import measure, propagate, weights
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.sites import module_path
from evla_compile.passes import ExposeStages, FoldConstants, LowerPrecision, SpecializeShapes, UnrollDiffusion
from evla_compile.passes.lower_precision import lowered_sites
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.precision import LOWER_PRECISIONS, LowerPrecisionName

aten = torch.ops.aten
STEPS = 2


class Rounding(TorchFunctionMode):
    """Computes linear layers, attention and token embeddings in another dtype; everything else as it is."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rounded = (
            functional.linear,
            functional.scaled_dot_product_attention,
            functional.embedding,
        )
        if self._inside or func not in rounded:
            return func(*args, **(kwargs or {}))
        self._inside = True
        try:
            args, kwargs = torch.utils._pytree.tree_map(self._round, (args, kwargs or {}))
            result: Tensor = func(*args, **kwargs)
            return result.to(torch.float32)
        finally:
            self._inside = False

    def _round(self, value: object) -> object:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.fixture(scope="module")
def finished(small_graph: fx.GraphModule) -> fx.GraphModule:
    """The small policy without any lossy pass: batch 2, 9 text tokens, two denoising steps."""
    passes = UnrollDiffusion(ddim_steps=STEPS), SpecializeShapes(text_tokens=9), FoldConstants()
    return run_passes(small_graph, passes)[0]


def ranges_of(graph: fx.GraphModule, largest: float = 1.0) -> tuple[tuple[str, float], ...]:
    return tuple((module_path(site), largest) for site in lowered_sites(graph.graph))


@contextmanager
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", LOWER_PRECISIONS)
def test_lowering_equals_the_eager_policy_with_rounded_products(
    dtype: LowerPrecisionName,
    finished: fx.GraphModule,
    small_policy: CogACT,
    small_config: CompileConfig,
    small_inputs: Sequence[Tensor],
) -> None:
    lowered, _ = LowerPrecision(dtype=dtype, ranges=ranges_of(finished))(finished)
    both, _ = ExposeStages(stages=("cognition", "samples"))(lowered)
    image, ids, length, noise = small_inputs
    with no_grad():
        cognition, samples = both(*small_inputs)
        with Rounding(getattr(torch, dtype)):
            expected = small_policy.cognition(image, ids, length)
        denoised = small_policy.denoise(expected, noise, ddim_steps=STEPS, cfg_scale=small_config.cfg_scale)
        plain = small_policy.cognition(image, ids, length)
    assert cognition.dtype == samples.dtype == torch.float32
    # Not equal bit by bit: attention and biases are summed in another order. Far below the rounding itself, though.
    assert (cognition - expected).abs().max() < 0.2 * (plain - expected).abs().max()
    assert (samples - denoised).abs().max() < 1e-2 * denoised.abs().max()


def test_weights_of_the_products_are_halved_and_nothing_else(finished: fx.GraphModule) -> None:
    lowered, report = LowerPrecision(dtype="bfloat16")(finished)
    for name, tensor in weights(lowered):
        halved = tensor.dtype == torch.bfloat16
        of_action = name.startswith(("action_model", "held_"))
        token = name.split(".")[-1] in ("pos_embed", "gamma", "cls_token", "reg_token")
        assert halved != (of_action or token or "norm" in name or "patch_embed" in name), name
    products = sum(tensor.numel() * 2 for name, tensor in weights(lowered) if tensor.dtype == torch.bfloat16)
    assert report.before.weight_bytes - report.after.weight_bytes == products
    assert not report.exact
    assert report.changes == len(list(lowered_sites(finished.graph)))


def test_only_products_compute_in_the_lower_dtype(finished: fx.GraphModule) -> None:
    lowered, _ = LowerPrecision(dtype="bfloat16")(finished)
    moves = (aten.view.default, aten.transpose.int, aten.permute.default, aten.reshape.default, aten.unbind.int)
    products = (
        aten.linear.default,
        aten.scaled_dot_product_attention.default,
        aten.embedding.default,
    )
    found = set()
    for node in lowered.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            found.add(node.target)
            assert node.target in (*products, *moves, operator.getitem, aten.to.dtype), node.format_node()
    assert found.issuperset(products)


def test_no_value_is_cast_up_and_down_again(finished: fx.GraphModule) -> None:
    lowered, _ = LowerPrecision(dtype="bfloat16")(finished)
    for node in lowered.graph.nodes:
        if node.target == aten.to.dtype and node.args[1] == torch.bfloat16:
            source = node.args[0]
            while source.target in (aten.view.default, aten.transpose.int, aten.reshape.default):
                source = source.args[0]
            assert source.target != aten.to.dtype, f"{node} only undoes {source}"


def test_values_handed_on_and_stages_stay_float32(finished: fx.GraphModule) -> None:
    lowered, _ = LowerPrecision(dtype="bfloat16")(finished)
    stages = {node.meta["stage"]: node.meta["val"].dtype for node in lowered.graph.nodes if "stage" in node.meta}
    before = {node.meta["stage"] for node in finished.graph.nodes if "stage" in node.meta}
    assert set(stages) == before
    assert set(stages.values()) == {torch.float32}


def test_the_input_graph_stays_as_it_was(
    finished: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(finished):
        LowerPrecision(dtype="bfloat16")(finished)


def test_casts_are_signed_by_the_pass(finished: fx.GraphModule) -> None:
    lowered, _ = LowerPrecision(dtype="bfloat16")(finished)
    casts = [node for node in lowered.graph.nodes if node.target == aten.to.dtype and node.args[1] == torch.bfloat16]
    kinds = {next(reversed(node.meta["nn_module_stack"].values()))[1] for node in casts}
    assert kinds == {"evla_compile.passes.LowerPrecision"}


def test_float16_needs_observed_ranges(finished: fx.GraphModule) -> None:
    with pytest.raises(
        PassError, match=r"float16: \d+ layers, .* were not observed in calibration.*or choose bfloat16"
    ):
        LowerPrecision(dtype="float16")(finished)


@pytest.mark.parametrize("largest", [32752 * 1.01, float("inf"), float("nan")])
def test_float16_is_refused_where_a_layer_was_seen_to_overflow_it(finished: fx.GraphModule, largest: float) -> None:
    ranges = dict(ranges_of(finished))
    hot = "llm_backbone.llm.model.layers.2.mlp.down_proj"
    assert hot in ranges
    ranges[hot] = largest
    with pytest.raises(PassError, match=f"float16 cannot hold {hot}, where calibration observed .* choose bfloat16"):
        LowerPrecision(dtype="float16", ranges=tuple(ranges.items()))(finished)
    LowerPrecision(dtype="bfloat16", ranges=tuple(ranges.items()))(finished)


def test_float16_is_refused_from_half_of_its_largest_value_on(finished: fx.GraphModule) -> None:
    LowerPrecision(dtype="float16", ranges=ranges_of(finished, 32752.0))(finished)  # 65504 / 2
    with pytest.raises(PassError, match=r"calibration observed 3\.275e\+04 \(limit 32752, half of float16's largest"):
        LowerPrecision(dtype="float16", ranges=ranges_of(finished, 32752.1))(finished)


def test_a_weight_that_float32_operators_also_read_stays_float32() -> None:
    """One linear layer reads two weights; the first is also added to its result."""
    holder, graph = torch.nn.Module(), fx.Graph()
    generator = torch.Generator().manual_seed(0)
    x = graph.placeholder("x")
    for name in ("shared", "alone"):
        holder.register_buffer(name, torch.randn(4, 4, generator=generator))
    shared, alone = graph.get_attr("shared"), graph.get_attr("alone")
    first = graph.call_function(aten.linear.default, (x, shared))
    second = graph.call_function(aten.linear.default, (first, alone))
    for node in (first, second):
        node.meta["nn_module_stack"] = {"p": ("projector.fc", "torch.nn.Linear")}
    graph.output((graph.call_function(aten.add.Tensor, (second, graph.get_attr("shared"))), second))
    with FakeTensorMode() as mode:
        x.meta["val"] = mode.from_tensor(torch.zeros(4, 4))
    gm = fx.GraphModule(holder, graph)
    propagate(gm)
    lowered, _ = LowerPrecision(dtype="bfloat16")(gm)
    assert {name: tensor.dtype for name, tensor in weights(lowered)} == {
        "shared": torch.float32,
        "alone": torch.bfloat16,
    }
    values = torch.randn(4, 4, generator=generator)
    total, product = lowered(values)
    assert total.dtype == product.dtype == torch.float32
    assert torch.equal(total, product + holder.get_buffer("shared"))


def test_a_graph_without_products_is_refused(small_sampler: fx.GraphModule) -> None:
    graph = fx.Graph()
    noise = graph.placeholder("noise")
    noise.meta["val"] = next(iter(small_sampler.graph.find_nodes(op="placeholder"))).meta["val"]
    graph.output(noise)
    with pytest.raises(PassError, match="nothing to lower"):
        LowerPrecision(dtype="bfloat16")(fx.GraphModule(torch.nn.Module(), graph))


def test_a_policy_in_half_precision_is_refused(small_bfloat16_graph: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"is torch.bfloat16: load the policy with dtype=torch.float32"):
        LowerPrecision(dtype="bfloat16")(small_bfloat16_graph)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype='float8': expected bfloat16 or float16"):
        LowerPrecision(dtype="float8")  # type: ignore[arg-type]


def test_no_weight_is_computed_by_the_pass(finished: fx.GraphModule) -> None:
    lowered, _ = LowerPrecision(dtype="bfloat16")(finished)
    assert {type(t).__name__ for _, t in weights(lowered) if t.dtype == torch.bfloat16} == {"DeferredWeight"}
    assert measure(lowered).flops == measure(finished).flops

"""torch.compile(policy, backend="evla"): what it returns, when it compiles, and what it refuses."""

import operator
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import evla_compile as evla
from evla_compile.errors import CalibrationError, PassError, UnsupportedModelError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import materialize
from evla_compile.graph.inputs import to_tensors
from evla_compile.graph.policy_call import enter_policy, leave_policy, replace_policy_call
from evla_compile.graph.sites import indexed_modules
from evla_compile.host.inputs import GraphInputs, InputSignature
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, plan_without_calibration
from evla_compile.settings.sizes import ModelSizes
from evla_compile.settings.tolerances import relative_error
from evla_compile.torch_backend import backend
from evla_compile.torch_backend.backend import compile_fx
from evla_compile.torch_backend.dynamo_graph import DynamoGraph, Number
from tests.paper_config import paper_config

BUDGETS = paper_config(keep_layers=4, visual_tokens=40, cache_interval=2, ddim_steps=5)
INSTRUCTIONS = ("pick up the apple", "open the top drawer of the cabinet")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The finished graphs of all compilations, in order."""
    finished: list[fx.GraphModule] = []

    def noting(gm: fx.GraphModule) -> None:
        finished.append(gm)
        materialize(gm)

    monkeypatch.setattr(backend, "materialize", noting)
    return finished


@pytest.fixture(scope="module")
def plan(tiny_policy: CogACT, frame: Image.Image) -> Plan:
    frames = [evla.Frame(frame, INSTRUCTIONS[0])]
    return evla.calibrate(tiny_policy, frames, BUDGETS, progress=False)


@pytest.fixture
def inputs(tiny_policy: CogACT, frame: Image.Image) -> Callable[..., list[Tensor]]:
    def make(number: int = 0, *, batch: int = 1, text_tokens: int = 32) -> list[Tensor]:
        signature = InputSignature.of(tiny_policy.sizes, batch_size=batch, text_tokens=text_tokens)
        images, texts = [frame] * batch, [INSTRUCTIONS[number]] * batch
        found = GraphInputs.prepare(tiny_policy.processor, images, texts, signature, seed=number)
        return list(to_tensors(found, torch.device("cpu")))

    return make


def test_the_backend_is_listed_for_torch() -> None:
    assert "evla" in torch.compiler.list_backends()
    assert torch._dynamo.lookup_backend("evla") is compile_fx


SMALL = CompileConfig.dense(text_tokens=9, batch_size=2)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, keep_layers=(0, 2, 3), ddim_steps=5, cache_interval=2),
        replace(SMALL, visual_tokens=7, key_tokens=2, cache_interval=5, cfg_scale=1.0),
    ],
    ids=["dense", "layers and cache", "tokens and cache, no guidance"],
)
def test_it_equals_compile(
    config: CompileConfig, small_policy: CogACT, small_inputs: Sequence[Tensor], calls: list[fx.GraphModule]
) -> None:
    options: dict[str, Any] = {"config": config, "mode": "eager"}
    fast = torch.compile(small_policy, backend="evla", options=options)
    found = fast(*small_inputs, ddim_steps=config.ddim_steps, cfg_scale=config.cfg_scale)
    expected = evla.compile(small_policy, config)
    assert relative_error(found.numpy(), expected.sample(*(tensor.numpy() for tensor in small_inputs))) < 1e-5
    (graph,) = calls
    assert len(indexed_modules(graph.graph, COGACT.denoising)) == config.ddim_steps
    # Conditions are embedded once in each step, and nothing else is there that `compile` leaves out.
    ops = [sum(node.op == "call_function" for node in gm.graph.nodes) for gm in (graph, expected.graph)]
    assert ops[1] <= ops[0] <= ops[1] + 4 * config.ddim_steps


def test_it_compiles_once_for_two_instructions(
    tiny_policy: CogACT, plan: Plan, inputs: Callable[..., list[Tensor]], calls: list[fx.GraphModule]
) -> None:
    options: dict[str, Any] = {"config": BUDGETS, "plan": plan, "mode": "eager"}
    fast = torch.compile(tiny_policy, backend="evla", options=options)
    expected = evla.compile(tiny_policy, BUDGETS, plan=plan)
    lengths = []
    for number in (0, 1):
        given = inputs(number)
        lengths.append(int(given[2]))
        found = fast(*given, ddim_steps=BUDGETS.ddim_steps)
        assert relative_error(found.numpy(), expected.sample(*(tensor.numpy() for tensor in given))) < 1e-5
    assert lengths[0] != lengths[1]
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # within Inductor
def test_inductor_s_output_is_the_same(
    small_policy: CogACT, small_inputs: Sequence[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = replace(SMALL, keep_layers=(0, 2, 3), visual_tokens=7, key_tokens=2, ddim_steps=2)
    options: dict[str, Any] = {"config": config}
    fast = torch.compile(small_policy, backend="evla", options=options)
    expected = evla.compile(small_policy, config)
    image, ids, length, noise = small_inputs
    for shift in (0.0, 1.0):
        found = fast(image, ids, length, noise + shift, ddim_steps=2)
        arrays = [tensor.numpy() for tensor in (image, ids, length, noise + shift)]
        assert relative_error(found.numpy(), expected.sample(*arrays)) < 1e-5
    assert list(tmp_path.iterdir())


def test_a_policy_compiled_in_place_predicts_through_the_backend(
    tiny_checkpoint: Path, plan: Plan, frame: Image.Image, calls: list[fx.GraphModule]
) -> None:
    policy = evla.load(tiny_checkpoint)
    compiled = evla.compile(policy, BUDGETS, plan=plan)
    policy.compile(backend="evla", options={"config": BUDGETS, "plan": plan, "mode": "eager"})
    for instruction in INSTRUCTIONS:
        found = policy.predict_action(frame, instruction, "bridge_orig", ddim_steps=5)
        assert np.allclose(found, compiled.predict_action(frame, instruction, "bridge_orig"), rtol=0, atol=1e-6)
    assert len(calls) == 1


# Refusals


def refusal(kind: type[Exception], error: BaseException) -> str:
    """The message of the backend's own error, which Dynamo wraps."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # the loop ends at None
    assert error is not None
    return str(error)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"config": replace(SMALL, keep_layers=3)}, CalibrationError, "for keep_layers=3 has to be measured"),
        ({"modes": "eager"}, ValueError, r"options ['modes']: expected config, plan and mode"),
        ({"mode": "fast"}, ValueError, "options mode='fast': expected one of inductor, eager"),
        ({"config": 3}, ValueError, "expected a CompileConfig and a Plan"),
        (
            {"config": replace(SMALL, solver="dpm++", solver_timesteps=(90, 45))},
            ValueError,
            "solver='dpm++': torch.compile captures the policy's own loop",
        ),
        ({"config": replace(SMALL, ddim_steps=5)}, ValueError, "called with ddim_steps=10, not 5"),
        ({"config": replace(SMALL, cfg_scale=2.0)}, ValueError, "called with cfg_scale=1.5, not 2.0"),
        ({"config": replace(SMALL, batch_size=1)}, ValueError, "called with batch_size=2, not 1"),
        ({"config": replace(SMALL, text_tokens=12)}, ValueError, "input_ids has 9 text tokens"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], kind: type[Exception], message: str, small_policy: CogACT, small_inputs: Sequence[Tensor]
) -> None:
    fast = torch.compile(small_policy, backend="evla", options={"mode": "eager"} | options)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (Dynamo wraps it in an error of its own)
        fast(*small_inputs)
    assert message in refusal(kind, caught.value)


def scaled(policy: CogACT, factor: float) -> CogACT:
    """A policy of the same form with other weights."""
    other = deepcopy(policy)
    other.load_state_dict({name: tensor * factor for name, tensor in policy.state_dict().items()})
    return other


def small_error(fast: Callable[..., Tensor], policy: CogACT, inputs: Sequence[Tensor]) -> float:
    found, expected = fast(*inputs, ddim_steps=5), policy.sample(*inputs, ddim_steps=5)
    return relative_error(found.numpy(), expected.numpy())


TWO_ROWS: Any = {  # torch types options without the objects that a backend may take
    "config": CompileConfig.dense(text_tokens=9, batch_size=2, ddim_steps=5),
    "mode": "eager",
}


def test_policies_of_the_same_form_keep_their_own_weights(small_policy: CogACT, small_inputs: Sequence[Tensor]) -> None:
    policies = small_policy, scaled(small_policy, 1.1)
    fast = [torch.compile(policy, backend="evla", options=TWO_ROWS) for policy in policies]
    for call, policy in (*zip(fast, policies, strict=True), (fast[0], policies[0])):
        assert small_error(call, policy, small_inputs) < 1e-5


@pytest.mark.parametrize("assign", [False, True], ids=["in place", "assigned"])
def test_new_weights_of_a_policy_arrive(assign: bool, small_policy: CogACT, small_inputs: Sequence[Tensor]) -> None:
    policy = deepcopy(small_policy)
    fast = torch.compile(policy, backend="evla", options=TWO_ROWS)
    assert small_error(fast, policy, small_inputs) < 1e-5
    policy.load_state_dict(scaled(policy, 1.1).state_dict(), assign=assign)
    assert small_error(fast, policy, small_inputs) < 1e-5


@pytest.mark.parametrize("wrong", ["steps", "batch"])
def test_the_right_call_runs_behind_a_refused_one(
    wrong: str, small_policy: CogACT, small_inputs: Sequence[Tensor]
) -> None:
    fast = torch.compile(small_policy, backend="evla", options=TWO_ROWS)
    refused = small_inputs if wrong == "steps" else [torch.cat([tensor, tensor]) for tensor in small_inputs]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fast(*refused, ddim_steps=10 if wrong == "steps" else 5)
    assert "the policy was called with" in refusal(ValueError, caught.value)
    assert small_error(fast, small_policy, small_inputs) < 1e-5


def test_another_guidance_scale_behind_the_first_is_refused(
    small_policy: CogACT, small_inputs: Sequence[Tensor]
) -> None:
    fast = torch.compile(small_policy, backend="evla", options=TWO_ROWS)
    fast(*small_inputs, ddim_steps=5)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fast(*small_inputs, ddim_steps=5, cfg_scale=2.0)
    assert "called with cfg_scale=2.0, not 1.5" in refusal(ValueError, caught.value)


# A policy within a function


@pytest.fixture(scope="module")
def flat_policy(small_sizes: ModelSizes, small_policy: CogACT) -> CogACT:
    """A random policy with one block of every kind, which Dynamo reads soonest."""
    sizes = replace(
        small_sizes, language=replace(small_sizes.language, layers=1), action=replace(small_sizes.action, depth=1)
    )
    policy = CogACT(sizes, small_policy.processor).eval().requires_grad_(False)
    known = small_policy.state_dict()
    policy.load_state_dict({name: known[name] for name in policy.state_dict()})
    return policy


def one_step(text_tokens: int = 9) -> Any:
    return {"config": CompileConfig.dense(text_tokens=text_tokens, batch_size=2, ddim_steps=1), "mode": "eager"}


TRANSFORMED: dict[str, Callable[..., Any]] = {
    "text length": lambda policy, image, ids, length, noise: policy(image, ids, (length - 1).clamp(max=6), noise),
    "shorter ids": lambda policy, image, ids, length, noise: policy(image, ids[:, :-1], length - 1, noise),
    "longer ids": lambda policy, image, ids, length, noise: policy(
        image, torch.cat([ids, ids[:, :1]], 1), length, noise
    ),
    "image": lambda policy, image, ids, length, noise: policy(image // 2 + 100, ids, length, noise),
    "noise": lambda policy, image, ids, length, noise: policy(image, ids, length, 0.5 * noise + 1.0),
    "one value twice": lambda policy, image, ids, length, noise: policy(image, ids, ids[:, 0] % 5 + 4, noise) + noise,
    "samples": lambda policy, image, ids, length, noise: (policy(image, ids, length, noise)[:, 0] * 2, length + 1),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_values_computed_around_the_policy_are_read_rightly(
    name: str, flat_policy: CogACT, small_inputs: Sequence[Tensor]
) -> None:
    transformed = TRANSFORMED[name]

    def step(*arguments: Tensor) -> Any:
        return transformed(partial(flat_policy.sample, ddim_steps=1), *arguments)

    text_tokens = 9 + {"shorter ids": -1, "longer ids": 1}.get(name, 0)
    torch._dynamo.mark_dynamic(small_inputs[1], 1)
    found = torch.compile(step, backend="evla", options=one_step(text_tokens))(*small_inputs)
    expected = step(*small_inputs)
    for left, right in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert relative_error(left.numpy(), right.numpy()) < 1e-5


def test_arguments_may_have_each_other_s_names_and_the_function_more_of_them(
    flat_policy: CogACT, small_inputs: Sequence[Tensor]
) -> None:
    def step(noise: Tensor, text_length: Tensor, image: Tensor, input_ids: Tensor, other: Any) -> Tensor:
        # what is called noise is the image, and so on
        samples: Tensor = flat_policy.sample(noise, text_length, image, input_ids * other, ddim_steps=1) + other
        return samples

    fast = torch.compile(step, backend="evla", options=one_step())
    torch._dynamo.mark_dynamic(small_inputs[1], 1)
    image, ids, length, noise = small_inputs
    for other in (2, 3):  # Dynamo makes a number an input once it has changed
        found, expected = (call(image, ids, length, noise, other) for call in (fast, step))
        assert relative_error(found.numpy(), expected.numpy()) < 1e-5


def test_a_policy_may_be_part_of_a_module(flat_policy: CogACT, small_inputs: Sequence[Tensor]) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(7, 7)
            self.policy = flat_policy

        def forward(self, image: Tensor, input_ids: Tensor, text_length: Tensor, noise: Tensor) -> Tensor:
            scaled: Tensor = self.scale(self.policy.sample(image, input_ids, text_length, noise, ddim_steps=1))
            return scaled

    step = Step().requires_grad_(False)
    torch._dynamo.mark_dynamic(small_inputs[1], 1)
    found = torch.compile(step, backend="evla", options=one_step())(*small_inputs)
    assert relative_error(found.numpy(), step(*small_inputs).numpy()) < 1e-5


def test_dynamic_shapes_are_those_of_the_configuration(flat_policy: CogACT, small_inputs: Sequence[Tensor]) -> None:
    fast = torch.compile(flat_policy, backend="evla", options=one_step(), dynamic=True)
    found, expected = fast(*small_inputs, ddim_steps=1), flat_policy.sample(*small_inputs, ddim_steps=1)
    assert relative_error(found.numpy(), expected.numpy()) < 1e-5
    with pytest.raises(ValueError, match=r"cfg_scale=2\.0: the policy was compiled with 1\.5"):
        fast(*small_inputs, ddim_steps=1, cfg_scale=2.0)


def test_other_shapes_and_numbers_than_those_compiled_are_refused(
    small_sizes: ModelSizes, small_sampler: fx.GraphModule, small_inputs: Sequence[Tensor]
) -> None:
    plan = plan_without_calibration(small_sizes, SMALL)
    captured = DynamoGraph(small_sampler, {}, (Number("cfg_scale", 4, 1.5),))
    compiled = backend._Compiled(captured, plan, (), "eager", 9)
    image, ids, length, noise = small_inputs
    assert torch.equal(compiled(image, ids, length, noise, 1.5), small_sampler(*small_inputs))
    with pytest.raises(
        ValueError, match=r"image reaches the policy with the shape \[1, 56, 56, 3\], .* \[2, 56, 56, 3"
    ):
        compiled(image[:1], ids, length, noise, 1.5)
    with pytest.raises(ValueError, match=r"cfg_scale=2\.0: the policy was compiled with 1\.5"):
        compiled(image, ids, length, noise, torch.tensor(2.0, dtype=torch.float64))


def whole(image: Tensor, ids: Tensor, length: Tensor, noise: Tensor) -> Tensor:
    """What stands for a policy where its graph is refused before anything of it is read."""
    image, ids, length, noise = enter_policy(image, ids, length, noise, 0)
    samples: Tensor = leave_policy(noise + ids.shape[1])
    return samples


REFUSED: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "no policy": (
        lambda image, ids, length, noise: noise + 1,
        UnsupportedModelError,
        "a graph with 0 calls of a CogACT",
    ),
    "two policies": (
        lambda image, ids, length, noise: whole(image, ids, length, whole(image, ids, length, noise)),
        UnsupportedModelError,
        "a graph with 2 calls of a CogACT policy",
    ),
    "float image": (
        lambda image, ids, length, noise: whole(image / 255, ids, length, noise),
        UnsupportedModelError,
        "image reaches the policy as torch.float32[2, 56, 56, 3]: expected a tensor of torch.uint8 with 4 dimensions",
    ),
    "int32 ids": (
        lambda image, ids, length, noise: whole(image, ids.int(), length, noise),
        UnsupportedModelError,
        "expected a tensor of torch.int64 with 2 dimensions",
    ),
    "doubled ids": (
        lambda image, ids, length, noise: whole(image, ids.repeat(1, 2), length, noise),
        UnsupportedModelError,
        "expected this length plus or minus a number",
    ),
    "ids of a constant length": (
        lambda image, ids, length, noise: whole(image, ids[:, :7], length, noise),
        PassError,
        "the text length was captured as a constant",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused(name: str, small_inputs: Sequence[Tensor]) -> None:
    step, kind, message = REFUSED[name]
    torch._dynamo.mark_dynamic(small_inputs[1], 1)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        torch.compile(step, backend="evla", options=one_step())(*small_inputs)
    assert message in refusal(kind, caught.value)


def test_a_value_from_within_the_policy_is_refused() -> None:
    def step(image: Tensor, ids: Tensor, length: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        image, ids, length, noise = enter_policy(image, ids, length, noise, 0)
        inner = noise + 1
        return leave_policy(inner * 2), inner

    def backend_(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return replace_policy_call(gm, lambda *arguments: arguments[3], ())

    fast = torch.compile(step, backend=backend_)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fast(*(torch.zeros(2) for _ in range(4)))
    assert "reads inner within the policy" in refusal(UnsupportedModelError, caught.value)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda inner: inner.mul_(1.5),
    "function": torch.relu_,
    "in-place argument": lambda inner: torch.nn.functional.relu(inner, inplace=True),
    "output argument": lambda inner: torch.mul(inner, 1.5, out=inner),
    "item": lambda inner: inner.__setitem__(0, 1.5),
    "operator": lambda inner: operator.imul(inner, 1.5),  # type: ignore[no-untyped-call]  # typeshed left it so
    "overload": lambda inner: torch.ops.aten.mul_.Tensor(inner, 1.5),
}
"""Ways to write into a tensor, whose results a forward hook need not return."""


@pytest.mark.parametrize("name", WRITES)
def test_a_write_within_the_policy_is_refused(name: str) -> None:
    def hooked(image: Tensor, ids: Tensor, length: Tensor, noise: Tensor) -> Tensor:
        image, ids, length, noise = enter_policy(image, ids, length, noise, 0)
        inner = noise + 1
        WRITES[name](inner)
        samples: Tensor = leave_policy(inner * 2)
        return samples

    def backend_(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return replace_policy_call(gm, lambda *arguments: arguments[3], ())

    with pytest.raises(Exception) as caught:  # noqa: PT011
        torch.compile(hooked, backend=backend_)(*(torch.zeros(2) for _ in range(4)))
    found = refusal(UnsupportedModelError, caught.value)
    assert "writes into a tensor within the policy" in found
    assert "remove the hook" in found


def test_writes_around_the_policy_and_operators_with_similar_names_are_no_writes_within() -> None:
    def step(image: Tensor, ids: Tensor, length: Tensor, noise: Tensor) -> Tensor:
        image, ids, length, noise = enter_policy(image, ids, length, noise.clone().add_(1), 0)
        chosen = operator.and_(noise > 0, operator.invert(noise > 2))
        samples: Tensor = leave_policy(noise * chosen)
        return samples.mul_(2)

    def backend_(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return replace_policy_call(gm, lambda *arguments: arguments[3] + 1, ())

    assert torch.compile(step, backend=backend_)(*(torch.zeros(2) for _ in range(4))).tolist() == [4.0, 4.0]


def test_fullgraph_says_what_breaks_the_graph(small_policy: CogACT, small_inputs: Sequence[Tensor]) -> None:
    fast = torch.compile(small_policy, backend="evla", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"leave out\s+fullgraph=True"):
        fast(*small_inputs)

"""torch.compile(policy, backend="evla"): what it returns, when it compiles, and what it refuses."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, fx, nn

import evla_compile as evla
from evla_compile import backend, host
from evla_compile.backend import compile_fx
from evla_compile.config import CompileConfig
from evla_compile.errors import CalibrationError, PassError, UnsupportedModelError
from evla_compile.graph import materialize
from evla_compile.model.policy import CogACT
from evla_compile.passes import SpecializeShapes
from evla_compile.plan import Plan
from evla_compile.processor import draw_noise
from evla_compile.sites import DENOISING, indexed_modules
from evla_compile.tolerances import relative_error

BUDGETS = CompileConfig(keep_layers=4, visual_tokens=40, cache_interval=2, ddim_steps=5)
INSTRUCTIONS = ("pick up the apple", "open the top drawer of the cabinet")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The finished graphs of all compilations, in order."""
    made: list[fx.GraphModule] = []

    def noting(gm: fx.GraphModule) -> None:
        made.append(gm)
        materialize(gm)

    monkeypatch.setattr("evla_compile.backend.materialize", noting)
    return made


@pytest.fixture(scope="module")
def plan(tiny_policy: CogACT, frame: Image.Image) -> Plan:
    frames = [evla.Frame(frame, INSTRUCTIONS[0])]
    return evla.calibrate(tiny_policy, frames, BUDGETS, progress=False)


@pytest.fixture
def inputs(tiny_policy: CogACT, frame: Image.Image) -> Callable[..., list[Tensor]]:
    def make(number: int = 0, *, batch: int = 1, text_tokens: int = 32) -> list[Tensor]:
        found = host.prepare(
            tiny_policy.processor,
            [frame] * batch,
            [INSTRUCTIONS[number]] * batch,
            text_tokens=text_tokens,
            batch_size=batch,
        )
        sizes = tiny_policy.sizes.action
        noise = draw_noise((batch, sizes.chunk, sizes.action_width), number)
        return [torch.from_numpy(array) for array in (found.image, found.input_ids, found.text_length, noise)]

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
    assert len(indexed_modules(graph.graph, DENOISING)) == config.ddim_steps
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
        ({"config": replace(SMALL, keep_layers=3)}, CalibrationError, "need to know which layers"),
        ({"modes": "eager"}, ValueError, r"options ['modes']: expected config, plan and mode"),
        ({"mode": "fast"}, ValueError, "options mode='fast': expected one of inductor, eager"),
        ({"config": 3}, ValueError, "expected a CompileConfig and a Plan"),
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
    assert "torch._dynamo.reset()" in refusal(ValueError, caught.value)


@pytest.mark.parametrize("extra", ["tensor", "number", "output"])
def test_what_surrounds_the_policy_is_refused(extra: str, small_policy: CogACT, small_inputs: Sequence[Tensor]) -> None:
    def step(
        image: Tensor, input_ids: Tensor, text_length: Tensor, noise: Tensor, other: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        samples = small_policy.sample(image, input_ids, text_length, noise, ddim_steps=5)
        return (samples, samples + 1) if extra == "output" else samples + other

    fast = torch.compile(step, backend="evla", options=TWO_ROWS)
    image, input_ids, text_length, noise = small_inputs
    torch._dynamo.mark_dynamic(input_ids, 1)
    if extra == "number":  # Dynamo makes a number an input once it has changed
        fast(image, input_ids, text_length, noise, 2)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fast(image, input_ids, text_length, noise, torch.ones(7) if extra == "tensor" else 3)
    assert "compiles a CogACT policy alone" in refusal(UnsupportedModelError, caught.value)


def test_another_module_is_refused() -> None:
    fast = torch.compile(nn.Linear(3, 3), backend="evla")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fast(torch.zeros(1, 3))
    assert "compiles a CogACT policy as a whole" in refusal(UnsupportedModelError, caught.value)


def test_a_text_length_that_was_not_kept_symbolic_is_refused(small_sampler: fx.GraphModule) -> None:
    static, _ = SpecializeShapes(text_tokens=9)(small_sampler)
    with pytest.raises(PassError, match="the text length was captured as a constant"):
        backend._check_call(static, replace(SMALL, ddim_steps=5))
    backend._check_call(small_sampler, replace(SMALL, ddim_steps=5))


def test_fullgraph_says_what_breaks_the_graph(small_policy: CogACT, small_inputs: Sequence[Tensor]) -> None:
    fast = torch.compile(small_policy, backend="evla", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"leave out\s+fullgraph=True"):
        fast(*small_inputs)

"""Settings of torch around a call: none of them reaches what is captured, calibrated, recorded, sampled or exported."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils import _pytree as pytree

import evla_compile as evla
from evla_compile.estimate.estimates import estimate
from evla_compile.exporters.artifact import record_cases
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import weights
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.processor import Processor
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.sizes import ModelSizes
from evla_compile.verification.verify import verify
from tests.paper_config import paper_config

CONFIG = paper_config(
    keep_layers=3,
    mlp_keep=0.75,
    visual_tokens=7,
    key_tokens=2,
    ddim_steps=1,
    cache_interval=1,
    text_tokens=32,
    batch_size=2,
)
FP32 = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]

State = Callable[[], AbstractContextManager[Any]]


class Halving(TorchFunctionMode):
    """Computes half of what a linear layer would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 0.5 * result if func is functional.linear else result


@contextmanager
def setting(write: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    write(value)
    try:
        yield
    finally:
        write(before)


def fp32_precision(key: tuple[str, str], value: str, before: str) -> AbstractContextManager[None]:
    return setting(partial(torch._C._set_fp32_precision_setter, *key), value, before)


def cudnn_allow_tf32(value: bool) -> AbstractContextManager[None]:
    return setting(torch._C._set_cudnn_allow_tf32, value, True)


@contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    """The older setting, and behind it the newer ones that it writes."""
    with (
        fp32_precision(("cuda", "matmul"), "none", "none"),
        fp32_precision(("mkldnn", "matmul"), "none", "none"),
        setting(torch.set_float32_matmul_precision, value, "highest"),
    ):
        yield


STATES: dict[str, State] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast of a GPU": lambda: setting(partial(torch.set_autocast_enabled, "cuda"), True, False),
    "matmul precision medium": lambda: matmul_precision("medium"),
    "matmul precision high": lambda: matmul_precision("high"),
    "bfloat16 products on a CPU": lambda: fp32_precision(("mkldnn", "matmul"), "bf16", "none"),
    "bfloat16 convolutions on a CPU": lambda: fp32_precision(("mkldnn", "conv"), "bf16", "none"),
    "bfloat16 wherever there is float32": lambda: fp32_precision(("generic", "all"), "bf16", "none"),
    "TF32 on a GPU": lambda: fp32_precision(("cuda", "all"), "tf32", "none"),
    "TF32 products on a GPU": lambda: fp32_precision(("cuda", "matmul"), "tf32", "none"),
    "no TF32 in cuDNN": lambda: cudnn_allow_tf32(False),
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "function mode": Halving,
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "deterministic algorithms": lambda: setting(torch.use_deterministic_algorithms, True, False),
}


@contextmanager
def everything() -> Iterator[None]:
    """All of it at once, but for settings that another one overrides."""
    names = ("autocast", "matmul precision medium", "bfloat16 convolutions on a CPU", "default dtype float64")
    with ExitStack() as stack:
        for name in (*names, "default device", "function mode", "inference mode"):
            stack.enter_context(STATES[name]())
        yield


def settings() -> dict[str, Any]:
    """What torch says of its state, each setting by itself."""
    found: dict[str, Any] = {f"autocast {device}": torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    found |= {" ".join(key): torch._C._get_fp32_precision_getter(*key) for key in [("generic", "all"), *FP32]}
    for name, read in (
        ("matmul", torch.get_float32_matmul_precision),
        ("cublas", torch._C._get_cublas_allow_tf32),
        ("cudnn", torch._C._get_cudnn_allow_tf32),
    ):
        try:
            found[name] = read()
        except RuntimeError:  # torch's refusal to tell where older and newer settings disagree
            found[name] = "disagrees"
    found |= {"dtype": torch.get_default_dtype(), "device": _device.CURRENT_DEVICE}
    found |= {"modes": torch._C._len_torch_function_stack(), "inference": torch.is_inference_mode_enabled()}
    return found


# The block itself


@pytest.mark.parametrize("name", STATES)
def test_within_the_block_settings_are_its_own_and_behind_it_the_caller_s(name: str) -> None:
    with STATES[name]():
        before = settings()
        with own_torch_state():
            found, gradients = settings(), torch.is_grad_enabled()
            assert torch.zeros(1).dtype == torch.float32
            assert torch.zeros(1).device.type == "cpu"
        assert settings() == before
    assert not gradients
    assert {found[" ".join(key)] for key in FP32} <= {"none", "ieee"}
    assert (found["matmul"], found["cublas"], found["cudnn"]) == ("highest", False, False)
    assert not any(found[name] for name in ("autocast cpu", "autocast cuda", "modes", "inference"))
    assert (found["dtype"], found["device"]) == (torch.float32, None)


def test_settings_that_inherited_inherit_behind_the_block() -> None:
    with STATES["bfloat16 wherever there is float32"](), own_torch_state():
        pass
    assert torch._C._get_fp32_precision_getter("mkldnn", "conv") == "none"


def test_an_error_within_the_block_restores_the_caller_s_settings() -> None:
    with everything():
        before = settings()
        with pytest.raises(KeyError), own_torch_state():
            raise KeyError
        assert settings() == before


@pytest.mark.parametrize(
    "name", ["matmul precision medium", "bfloat16 wherever there is float32", "TF32 on a GPU", "default dtype bfloat16"]
)
@pytest.mark.parametrize("found", [nullcontext, STATES["no TF32 in cuDNN"]], ids=["TF32 in cuDNN", "full already"])
def test_a_block_within_another_sets_again_what_was_changed_in_between(name: str, found: State) -> None:
    with found():
        before = settings()
        with own_torch_state():
            expected = settings()
            with STATES[name]():
                assert settings() != expected
                with own_torch_state():
                    assert settings() == expected
                assert settings() == expected  # what was found in between is not restored
        assert settings() == before


def test_blocks_of_two_threads_may_overlap_in_any_order() -> None:
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with own_torch_state():
            entered.set()
            left.wait(10)

    with STATES["default dtype float64"]():
        with own_torch_state():
            thread = threading.Thread(target=other)
            thread.start()
            assert entered.wait(10)
        assert torch.get_default_dtype() == torch.float32  # the other thread still computes
        left.set()
        thread.join()
        assert torch.get_default_dtype() == torch.float64


# What must not change


@pytest.fixture(scope="module")
def policy(small_sizes: ModelSizes, tiny_policy: CogACT) -> CogACT:
    """A random policy of the small sizes that knows words, and has statistics to predict with."""
    sizes = replace(small_sizes, language=replace(small_sizes.language, vocabulary=32064))
    known = tiny_policy.processor
    processor = Processor(
        tokenizer_json=known.tokenizer_json, statistics=known.statistics, image_side=56, pad_id=known.pad_id
    )
    policy = CogACT(sizes, processor).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for parameter in policy.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def frames(frame: Image.Image) -> list[evla.Frame]:
    return [evla.Frame(frame, "pick up the apple"), evla.Frame(frame.rotate(180), "open the top drawer")]


@pytest.fixture(scope="module")
def plan(policy: CogACT, frames: list[evla.Frame]) -> evla.Plan:
    return evla.calibrate(policy, frames, CONFIG, progress=False)


@pytest.fixture(scope="module")
def compiled(policy: CogACT, plan: evla.Plan, frames: list[evla.Frame]) -> evla.CompiledPolicy:
    return evla.compile(policy, CONFIG, plan=plan, calibration=frames)


@pytest.fixture(scope="module")
def arrays(compiled: evla.CompiledPolicy, frames: list[evla.Frame]) -> list[NDArray[Any]]:
    """Inputs of the policy's graph."""
    return list(record_cases(compiled, ("samples",))[0].inputs.arrays)


def described(gm: fx.GraphModule) -> tuple[Any, ...]:
    """A graph's operators, the form of each value, and the bytes of its weights."""
    nodes = [
        (node.format_node(), [form(value) for value in pytree.tree_leaves(node.meta.get("val"))])
        for node in gm.graph.nodes
    ]
    return (*nodes, *((*form(tensor), (tensor + 0).numpy().tobytes()) for _, tensor in weights(gm)))


def form(value: Any) -> tuple[Any, ...]:
    return (value.dtype, value.device, str(list(value.shape))) if isinstance(value, Tensor) else (str(value),)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", STATES)
def test_samples_are_the_same_bytes_in_every_state(
    name: str, policy: CogACT, compiled: evla.CompiledPolicy, arrays: list[NDArray[Any]]
) -> None:
    tensors = [torch.from_numpy(array) for array in arrays]
    condition = policy.cognition(*tensors[:3])
    run = compiled.to_torch("eager")
    found = []
    for state in (nullcontext, STATES[name]):
        with state():
            results = (policy.sample(*tensors), policy(*tensors), policy.denoise(condition, tensors[3]), run(*tensors))
            found.append([samples.numpy().tobytes() for samples in results] + [compiled.sample(*arrays).tobytes()])
    assert found[0] == found[1]


# Every way in, with all of it switched on at once


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """Its result outside, and inside every state at once."""
    outside = run()
    with everything():
        inside = run()
    return outside, inside


def test_predictions(policy: CogACT, compiled: evla.CompiledPolicy, frames: list[evla.Frame]) -> None:
    images, texts = zip(*frames, strict=True)
    for predict in (policy.predict_action, compiled.predict_action):
        outside, inside = both(partial(predict, list(images), list(texts), "bridge_orig"))
        assert outside.tobytes() == inside.tobytes()
    outside, inside = both(partial(compiled.kept_tokens, list(images), list(texts)))
    assert outside.tobytes() == inside.tobytes()


def test_captures(policy: CogACT) -> None:
    outside, inside = both(lambda: described(capture(policy, CompileConfig.dense(text_tokens=9))))
    assert outside == inside


def test_plans(policy: CogACT, frames: list[evla.Frame]) -> None:
    config = replace(CONFIG, layer_rule="greedy")
    outside, inside = both(lambda: evla.calibrate(policy, frames, config, progress=False).to_json())
    assert outside == inside


def test_compilations(policy: CogACT, plan: evla.Plan, frames: list[evla.Frame]) -> None:
    def run() -> Any:
        compiled = evla.compile(policy, CONFIG, plan=plan, calibration=frames)
        return described(compiled.graph), compiled.report.to_json()

    outside, inside = both(run)
    assert outside == inside


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_exports(precision: Any, compiled: evla.CompiledPolicy, tmp_path: Path) -> None:
    compiled.export(tmp_path / "outside", precision=precision)
    with everything():
        compiled.export(tmp_path / "inside", precision=precision)
        if precision == "float32":
            verify(tmp_path / "inside", threads=1)
    assert contents(tmp_path / "outside") == contents(tmp_path / "inside")


def test_exported_programs(compiled: evla.CompiledPolicy, tmp_path: Path) -> None:
    compiled.export(tmp_path / "outside.pt2", precision="bfloat16")
    with everything():
        compiled.export(tmp_path / "inside.pt2", precision="bfloat16")
    programs = [torch.export.load(tmp_path / f"{name}.pt2") for name in ("outside", "inside")]
    texts = [str(program.graph) for program in programs]
    assert texts[0] == texts[1]
    states = [{name: tensor.float().numpy().tobytes() for name, tensor in p.state_dict.items()} for p in programs]
    assert states[0] == states[1]


def test_checkpoints(tiny_checkpoint: Path) -> None:
    def run() -> Any:
        state = evla.load(tiny_checkpoint).state_dict()
        return {name: (t.dtype, t.device, t.is_inference(), t.numpy().tobytes()) for name, t in state.items()}

    outside, inside = both(run)
    assert outside == inside


def test_estimates(small_sizes: ModelSizes) -> None:
    outside, inside = both(lambda: json.dumps(estimate(small_sizes, CompileConfig.dense(ddim_steps=1)).to_json()))
    assert outside == inside


def test_torch_compile(small_policy: CogACT, small_inputs: Sequence[Tensor]) -> None:
    options: Any = {"config": CompileConfig.dense(text_tokens=9, batch_size=2, ddim_steps=1), "mode": "eager"}

    def run() -> bytes:
        torch._dynamo.reset()
        fast = torch.compile(small_policy, backend="evla", options=options)
        return bytes(fast(*small_inputs, ddim_steps=1).numpy().tobytes())

    outside = run()
    with ExitStack() as stack:
        for name in ("autocast", "matmul precision medium", "default dtype float64", "default device"):
            stack.enter_context(STATES[name]())
        assert run() == outside
    with STATES["function mode"](), pytest.raises(Exception, match="1 modes that intercept torch functions"):
        run()
    torch._dynamo.reset()

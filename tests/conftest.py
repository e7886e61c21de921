"""Golden data, and the two policies that the tests run: the tiny golden model and a smaller random one."""

import importlib.util
import json
import lzma
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, processors
from torch import Tensor, fx

from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import get_tensor, weights
from evla_compile.graph.sites import module_path
from evla_compile.host.processor import Processor
from evla_compile.passes import UnrollDiffusion
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.sizes import ActionSizes, LanguageSizes, ModelSizes, TowerSizes

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors here are tiny: on a busy machine, threads would wait for each other far longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def gradients_stay_on() -> Iterator[None]:
    """A test that leaves torch's gradients off would break others, far away from itself."""
    yield
    leaked = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    assert not leaked, "gradients were left off"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden(golden_dir: Path) -> dict[str, Any]:
    """Dimensions of the tiny golden model, its cases and the rewrites applied to it."""
    contents: dict[str, Any] = json.loads((golden_dir / "golden.json").read_text(encoding="utf-8"))
    return contents


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """Llama-2's tokenizer as a tokenizer.json."""
    return lzma.decompress((DATA / "tokenizer.json.xz").read_bytes()).decode("utf-8")


@pytest.fixture(scope="session")
def frame() -> Image.Image:
    """The RGB camera frame of every golden case, 320x240 pixels."""
    with Image.open(DATA / "frame.png") as image:
        return image.copy()


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, golden_dir: Path, golden: dict[str, Any], tokenizer_json: str
) -> Path:
    """Run directory of the tiny golden model in CogACT's layout, with Llama-2's tokenizer."""
    spec = importlib.util.spec_from_file_location("weights", golden_dir / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = tmp_path_factory.mktemp("tiny")
    (run / "checkpoints").mkdir()
    groups = {
        group: {key: torch.from_numpy(module.fill(f"{group}.{key}", tuple(shape))) for key, shape in keys.items()}
        for group, keys in golden["manifest"].items()
    }
    torch.save({"model": groups}, run / "checkpoints" / "step-000001-epoch-00-loss=0.1000.pt")
    heads = {part: golden["dims"][part]["heads"] for part in ("dino", "siglip", "llm", "dit")}
    (run / "config.json").write_text(json.dumps({"vla": {}, "evla_compile": {"heads": heads}}), encoding="utf-8")
    shutil.copy(golden_dir / "dataset_statistics.json", run)
    (run / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    return run


@pytest.fixture(scope="session")
def tiny_policy(tiny_checkpoint: Path) -> CogACT:
    """The golden model, 19 MB."""
    return load(tiny_checkpoint)


@pytest.fixture(scope="session")
def captured(tiny_policy: CogACT) -> fx.GraphModule:
    """Noise prediction of the golden model: batch 1, 32 text tokens, guidance 1.5."""
    return capture(tiny_policy, CompileConfig.dense())


@pytest.fixture(scope="session")
def small_sizes() -> ModelSizes:
    """Sizes of a policy that is as small as every rewrite allows; sizes that a mistake could swap differ."""
    return ModelSizes(
        dino=TowerSizes(
            width=16, depth=2, heads=2, mlp_width=28, patches=16, class_tokens=1, register_tokens=2, layer_scale=True
        ),
        siglip=TowerSizes(width=12, depth=2, heads=1, mlp_width=26, patches=16),
        projector=(28, 40, 32, 32),
        language=LanguageSizes(width=32, layers=4, heads=4, kv_heads=4, mlp_width=48, vocabulary=64),
        action=ActionSizes(
            width=20, depth=2, heads=2, mlp_width=44, condition_width=32, frequencies=18, chunk=5, action_width=7
        ),
    )


@pytest.fixture(scope="session")
def small_policy(small_sizes: ModelSizes) -> CogACT:
    """A random policy of `small_sizes`; its tokenizer is only there to be carried along."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3}, "<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    processor = Processor(tokenizer_json=tokenizer.to_str(), statistics={}, image_side=56, pad_id=0)
    policy = CogACT(small_sizes, processor).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in policy.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
        else:
            parameter.copy_(noise * (0.5 if parameter.shape[0] == 1 else 1.5 * math.prod(parameter.shape[1:]) ** -0.5))
    return policy


@pytest.fixture(scope="session")
def small_config() -> CompileConfig:
    """Dense settings for the small policy: two rows, so that one that leaks into the other is seen."""
    return CompileConfig.dense(text_tokens=9, batch_size=2)


@pytest.fixture(scope="session")
def small_graph(small_policy: CogACT, small_config: CompileConfig) -> fx.GraphModule:
    """Noise prediction of the small policy: batch 2, 9 text tokens, guidance 1.5."""
    return capture(small_policy, small_config)


@pytest.fixture(scope="session")
def small_unguided_graph(small_policy: CogACT) -> fx.GraphModule:
    """The small graph without guidance."""
    return capture(small_policy, CompileConfig.dense(text_tokens=9, batch_size=2, cfg_scale=1.0))


@pytest.fixture(scope="session")
def small_grouped_policy(small_policy: CogACT) -> CogACT:
    """The small policy with two key heads for its four query heads."""
    language = replace(small_policy.sizes.language, kv_heads=2)
    policy = CogACT(replace(small_policy.sizes, language=language), small_policy.processor).eval()
    known = small_policy.state_dict()
    policy.load_state_dict({name: known[name][: len(value)] for name, value in policy.state_dict().items()})
    return policy.requires_grad_(False)


@pytest.fixture(scope="session")
def small_bfloat16_policy(small_policy: CogACT) -> CogACT:
    """The small policy as `load(dtype=torch.bfloat16)` would cast it: the action head stays float32."""
    policy = deepcopy(small_policy).to(torch.bfloat16)
    policy.action_model = deepcopy(small_policy.action_model)
    return policy


@pytest.fixture(scope="session")
def small_bfloat16_graph(small_bfloat16_policy: CogACT, small_config: CompileConfig) -> fx.GraphModule:
    return capture(small_bfloat16_policy, small_config)


@pytest.fixture(scope="session")
def small_sampler(small_graph: fx.GraphModule) -> fx.GraphModule:
    """The small graph, unrolled over five denoising steps."""
    return UnrollDiffusion(ddim_steps=5)(small_graph)[0]


@pytest.fixture
def small_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames, ids, text lengths and noise for the small policy; the first row has three padding ids."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(1, 64, (2, 9), generator=generator)
    return image, input_ids, torch.tensor([6, 9]), torch.randn(2, 5, 7, generator=generator)


@pytest.fixture(scope="session")
def node_values() -> Callable[[fx.GraphModule, Sequence[Tensor]], dict[fx.Node, Any]]:
    """Runs a graph and returns the value of every node."""

    def run(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
        interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        interpreter.run(*inputs)
        return interpreter.env

    return run


@pytest.fixture(scope="session")
def untouched() -> Callable[[fx.GraphModule], AbstractContextManager[None]]:
    """Asserts that a graph leaves a `with` block as it entered: nodes, arguments, metadata and weights."""

    def nodes(gm: fx.GraphModule) -> list[str]:
        return [f"{n.format_node()} {module_path(n)} {n.meta.get('stage')} {n.meta.get('val')}" for n in gm.graph.nodes]

    @contextmanager
    def watch(gm: fx.GraphModule) -> Iterator[None]:
        described, tensors = nodes(gm), {name: (tensor, tensor.clone()) for name, tensor in weights(gm)}
        yield
        assert nodes(gm) == described
        for name, (tensor, contents) in tensors.items():
            assert get_tensor(gm, name) is tensor, name
            assert torch.equal(tensor, contents), name

    return watch

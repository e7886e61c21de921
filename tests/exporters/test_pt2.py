"""Compiled policies for programs that run torch: `.pt2` files and `to_torch`, read back and compared."""

import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import evla_compile as evla
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.errors import ArtifactError, EvlaError, ExportError
from evla_compile.exporters import to_pt2
from evla_compile.exporters.artifact import record_cases
from evla_compile.exporters.to_pt2 import DESCRIPTION
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.settings import tolerances
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.engine_settings import EngineSettings
from evla_compile.settings.precision import PRECISION_ROWS
from evla_compile.settings.tolerances import relative_error
from tests.paper_config import paper_config

CONFIG = paper_config(
    keep_layers=(0, 1, 3),
    mlp_keep=1.0,
    visual_tokens=7,
    key_tokens=2,
    cache_interval=2,
    ddim_steps=5,
    text_tokens=9,
    batch_size=2,
)
JIT = "ignore:.*torch.jit:DeprecationWarning"  # within Inductor


@pytest.fixture(scope="module")
def compiled(small_policy: CogACT) -> CompiledPolicy:
    return evla.compile(small_policy, CONFIG)


def samples(compiled: CompiledPolicy, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = compiled.graph(*inputs)
    return found


def test_an_exported_program_is_read_back(
    compiled: CompiledPolicy, small_inputs: Sequence[Tensor], tmp_path: Path
) -> None:
    compiled.export(tmp_path / "policy.pt2")
    extra = {DESCRIPTION: ""}
    module = torch.export.load(tmp_path / "policy.pt2", extra_files=extra).module()
    with torch.no_grad():
        (found,) = module(*small_inputs)
    assert torch.equal(found, samples(compiled, small_inputs))
    about = json.loads(extra[DESCRIPTION])
    assert CompileConfig.from_json(about["config"]) == CONFIG
    assert about["inputs"] == list(COGACT.input_names)
    assert about["outputs"] == ["samples"]
    compiled.export(tmp_path / "policy.pt2")  # over one of ours
    assert [path.name for path in tmp_path.iterdir()] == ["policy.pt2"]


def test_stages_and_precision_reach_the_file(
    tiny_policy: CogACT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = paper_config(
        keep_layers=(0, 1, 2, 4), mlp_keep=1.0, visual_tokens=40, cache_interval=2, ddim_steps=5, cfg_scale=1.0
    )
    policy = evla.compile(tiny_policy, config)
    policy.export(tmp_path / "policy.pt2", stages=("kept_patches",), precision="bfloat16")
    program = torch.export.load(tmp_path / "policy.pt2")
    inputs = [torch.from_numpy(array) for array in record_cases(policy, ("samples",))[0].inputs.arrays]
    with torch.no_grad():
        found, kept = program.module()(*inputs)
    assert kept.shape == (1, 40)
    assert 0 < relative_error(found.numpy(), samples(policy, inputs).numpy()) < 0.03
    assert {tensor.dtype for tensor in program.state_dict.values()} >= {torch.bfloat16, torch.float32}
    strict = replace(PRECISION_ROWS["bfloat16"], features=1e-5)
    monkeypatch.setattr(tolerances, "PRECISION_ROWS", {**PRECISION_ROWS, "bfloat16": strict})
    with pytest.raises(evla.VerificationError, match="in bfloat16: patches is"):
        policy.export(tmp_path / "other.pt2", precision="bfloat16")
    assert not (tmp_path / "other.pt2").exists()


@pytest.mark.filterwarnings(JIT)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # within torch.export
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_an_aotinductor_package_is_read_back(
    compiled: CompiledPolicy, small_inputs: Sequence[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compiled.export(tmp_path / "policy.pt2", packaging="aoti")
    run = torch._inductor.aoti_load_package(str(tmp_path / "policy.pt2"))
    about = json.loads(run.get_metadata()[DESCRIPTION])
    assert CompileConfig.from_json(about["config"]) == CONFIG
    (found,) = run(*small_inputs)
    assert relative_error(found.numpy(), samples(compiled, small_inputs).numpy()) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "policy.pt2"]


def test_a_tensor_that_another_compiled_policy_was_called_with_is_taken(
    compiled: CompiledPolicy, small_policy: CogACT, small_inputs: Sequence[Tensor]
) -> None:
    """The policy marks its text length dynamic, a mark that stays with the tensor."""
    options: dict[str, Any] = {"config": CONFIG, "mode": "eager"}
    fast = torch.compile(small_policy, backend="evla", options=options)
    static = torch.compile(compiled.graph, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert torch.allclose(fast(*small_inputs, ddim_steps=5), static(*small_inputs), atol=1e-5)


@pytest.mark.filterwarnings(JIT)
@pytest.mark.parametrize("mode", ["eager", "inductor"])
def test_a_function_of_torch_tensors_returns_the_samples(
    mode: str, compiled: CompiledPolicy, small_inputs: Sequence[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run = compiled.to_torch(mode)  # type: ignore[arg-type]  # parametrized by text
    image, ids, length, noise = small_inputs
    for shift in (0.0, 1.0):
        found = run(image, ids, length, noise + shift)
        expected = samples(compiled, (image, ids, length, noise + shift))
        assert relative_error(found.numpy(), expected.numpy()) < 1e-5
        assert not found.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_graphs_return_results_of_their_own(small_policy: CogACT, small_inputs: Sequence[Tensor]) -> None:
    policy = evla.compile(small_policy.cuda(), CONFIG)
    run = policy.to_torch("cudagraphs")
    image, ids, length, noise = (tensor.cuda() for tensor in small_inputs)
    first = run(image, ids, length, noise)
    kept = first.clone()
    second = run(image, ids, length, noise + 1)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


# Refusals


def test_a_pt2_of_somebody_else_is_not_replaced(
    compiled: CompiledPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = ("text.pt2", "zip.pt2", "policy.pt2")
    with zipfile.ZipFile(tmp_path / "zip.pt2", "w") as archive:
        archive.writestr("zip/model_metadata.json", "[1]")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "policy.pt2")
    (tmp_path / "text.pt2").write_bytes(b"mine")
    before = {name: (tmp_path / name).read_bytes() for name in others}
    monkeypatch.setattr(to_pt2, "split", lambda *arguments: pytest.fail("the work must not start"))
    for name in others:
        with pytest.raises(ArtifactError, match=rf"{name} exists and is not ours: choose another name or remove it"):
            compiled.export(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_pt2_does_not_have_is_refused(
    compiled: CompiledPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="packaging='onnx': expected 'exported' or 'aoti'"):
        compiled.export(tmp_path / "policy.pt2", packaging="onnx")  # type: ignore[arg-type]  # the point
    for settings in ({"parts": 2}, {"engine": EngineSettings()}):
        with pytest.raises(ValueError, match=r"parts= and engine= are not for a \.pt2"):
            compiled.export(tmp_path / "policy.pt2", **settings)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ExportError, match=r"AOTInductor needs a C\+\+ compiler .*apt install g\+\+"):
        compiled.export(tmp_path / "policy.pt2", packaging="aoti")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused(compiled: CompiledPolicy, tmp_path: Path) -> None:
    with pytest.raises((ArtifactError, OSError), match="absent"):
        compiled.export(tmp_path / "absent" / "policy.pt2")


def test_modes_that_are_not_there_are_refused(compiled: CompiledPolicy) -> None:
    with pytest.raises(ValueError, match="mode='fast': expected 'eager', 'inductor' or 'cudagraphs'"):
        compiled.to_torch("fast")  # type: ignore[arg-type]  # the point
    if not torch.cuda.is_available():
        with pytest.raises(EvlaError, match="mode='cudagraphs' needs a GPU"):
            compiled.to_torch("cudagraphs")

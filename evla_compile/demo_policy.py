"""The demo's policy: of CogACT's shape, small, with weights that are random but always the same."""

import json
import lzma
import math
import zlib
from dataclasses import replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from evla_compile.calibration import Frame
from evla_compile.model.action import ActionModel, ActionSizes
from evla_compile.model.language import LanguageBackbone, LanguageSizes
from evla_compile.model.policy import ModelSizes, Projector
from evla_compile.model.vision import TowerSizes, VisionBackbone
from evla_compile.processor import ActionStatistics

DEMO_SIZES = ModelSizes(
    dino=TowerSizes(
        width=192, depth=4, heads=3, mlp_width=768, patches=256, class_tokens=1, register_tokens=4, layer_scale=True
    ),
    siglip=TowerSizes(width=192, depth=4, heads=3, mlp_width=720, patches=256),
    projector=(384, 768, 256, 256),
    language=LanguageSizes(width=256, layers=12, heads=4, kv_heads=4, mlp_width=1024, vocabulary=32064),
    action=ActionSizes(
        width=192, depth=4, heads=4, mlp_width=768, condition_width=256, frequencies=256, chunk=16, action_width=7
    ),
)
"""The frame, the patches, the vocabulary and the action chunk are CogACT's own."""

INSTRUCTIONS = (
    "move sponge near apple",
    "pick up the apple",
    "put the red apple on the sponge and push both to the left",
)
"""What to do with the things in the demo's frame."""

SPARE_EVERY = 3
"""Each so manieth decoder layer hardly changes its input, as happens in trained decoders."""

_STATISTICS = ActionStatistics(
    low=(-0.05, -0.05, -0.05, -0.25, -0.25, -0.25, 0.0),
    high=(0.05, 0.05, 0.05, 0.25, 0.25, 0.25, 1.0),
    mask=(True,) * 6 + (False,),
)
"""Made up, of the size of an arm's steps: metres, radians, gripper."""


def demo_frames() -> list[Frame]:
    """Return the shipped camera frame, once with each of `INSTRUCTIONS`."""
    with _data("frame.png").open("rb") as file, Image.open(file) as image:
        image.load()
    return [Frame(image, instruction) for instruction in INSTRUCTIONS]


def write_run_directory(folder: Path, sizes: ModelSizes) -> None:
    """Write a policy with random weights as an official run directory.

    Args:
        folder: where to; it must not exist.
        sizes: sizes of the policy, with CogACT's vocabulary.

    Raises:
        OSError: the folder exists or cannot be written.
    """
    folder.mkdir()
    (folder / "checkpoints").mkdir()
    groups = {
        group: {key: torch.from_numpy(demo_weights(f"{group}.{key}", shape)) for key, shape in shapes.items()}
        for group, shapes in _checkpoint_shapes(sizes).items()
    }
    torch.save({"model": groups}, folder / "checkpoints" / "demo.pt")
    heads = {
        "dino": sizes.dino.heads,
        "siglip": sizes.siglip.heads,
        "llm": sizes.language.heads,
        "dit": sizes.action.heads,
    }
    (folder / "config.json").write_text(json.dumps({"evla_compile": {"heads": heads}}), encoding="utf-8")
    (folder / "dataset_statistics.json").write_text(json.dumps({"demo": _STATISTICS.to_json()}), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(lzma.decompress(_data("tokenizer.json.xz").read_bytes()))


def demo_weights(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the weights of the tensor "group.key", which depend on its name and shape alone.

    They are normal, and scaled so that activations keep their size. Two traits of a trained policy are built in: some
    decoder layers hardly change their input, and the action head mostly returns the noise that it is given, without
    which the samples would grow in every denoising step.
    """
    if name == "action_model.net.final_layer.linear.weight":
        embedder = demo_weights("action_model.net.x_embedder.linear.weight", shape[::-1])
        return np.ascontiguousarray(np.float32(10 / shape[1]) * embedder.T)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    normal = generator.standard_normal(shape, dtype=np.float32)
    if name.endswith((".weight", ".gamma")) and len(shape) == 1:
        mean = 0.3 if name.endswith(".gamma") else 1.0
        return np.float32(mean) + np.float32(0.1) * normal
    return np.float32(_scale(name, shape)) * normal


def _scale(name: str, shape: tuple[int, ...]) -> float:
    parts = name.split(".")
    module, leaf = parts[-2:]
    if leaf == "bias":
        return 0.02
    if leaf != "weight" or "embed_tokens" in parts or "x_embedder" in parts:
        return 0.5  # whatever is an embedding, a learned token or a position
    branch = 1.0
    if module in ("o_proj", "down_proj"):
        layer = int(parts[parts.index("layers") + 1])
        branch = 0.05 if layer % SPARE_EVERY == SPARE_EVERY - 1 else 0.5
    return branch / math.sqrt(math.prod(shape[1:]))


def _checkpoint_shapes(sizes: ModelSizes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return a checkpoint's shapes by group and key, with each tower's last block and norm, which nothing reads."""
    dino, siglip = (replace(tower, depth=tower.depth + 1) for tower in (sizes.dino, sizes.siglip))
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            "vision_backbone": VisionBackbone(dino, siglip),
            "projector": Projector(sizes.projector),
            "llm_backbone": LanguageBackbone(sizes.language),
            "action_model": ActionModel(sizes.action),
        }
    shapes = {
        group: {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        for group, module in modules.items()
    }
    for name, tower in (("dino", dino), ("siglip", siglip)):
        norms = dict.fromkeys(("weight", "bias"), (tower.width,))
        shapes["vision_backbone"] |= {f"{name}_featurizer.norm.{key}": shape for key, shape in norms.items()}
    return shapes


def _data(name: str) -> Traversable:
    return resources.files("evla_compile") / "data" / "demo" / name

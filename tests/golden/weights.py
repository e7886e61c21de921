"""The golden model's weights: every tensor is a pure function of its name (group + "." + key) and shape."""

import zlib

import numpy as np


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 weights of tensor `name`: scaled normals, seeded by the name's CRC-32."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    x = rng.standard_normal(shape, dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if "norm" in name and leaf == "weight":
        return 1 + np.float32(0.1) * x
    if leaf == "gamma":  # LayerScale
        return np.float32(0.3) + np.float32(0.1) * x
    if "bias" in leaf:
        return np.float32(0.02) * x
    if len(shape) < 2:
        return np.float32(0.1) * x
    if leaf == "positional_embedding" or "embed_tokens" in name:
        return np.float32(0.5) * x
    if leaf in ("pos_embed", "cls_token", "reg_token", "uncondition", "latent"):
        return np.float32(0.1) * x
    scale = float(np.prod(shape[1:])) ** -0.5
    if "o_proj" in name or "down_proj" in name:  # some decoder layers come out nearly the identity, some far from it
        layer = name.split(".layers.")[1].split(".")[0]
        strength = (zlib.crc32(layer.encode() + b"strength") % 1000) / 1000.0
        scale *= 0.02 + 1.5 * strength * strength
    return (scale * x).astype(np.float32)

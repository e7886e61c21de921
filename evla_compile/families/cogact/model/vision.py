"""DINOv2 and SigLIP vision towers with the state-dict names of timm, which CogACT's checkpoints have.

Shape legend: B batch, C channels, S image side in pixels, P patches, N tokens (prefix and patches), D width, H heads,
E head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from evla_compile.settings.sizes import PATCH_SIDE, TowerSizes

DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class PatchEmbed(nn.Module):
    """Non-overlapping patches of 14 x 14 pixels to tokens: [B,3,S,S] -> [B,P,D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_SIDE, stride=PATCH_SIDE)

    def forward(self, pixels_BCSS: Tensor) -> Tensor:
        tokens: Tensor = self.proj(pixels_BCSS)  # [B,D,S/14,S/14]
        return tokens.flatten(2).transpose(1, 2)  # [B,P,D]


class Attention(nn.Module):
    """Bidirectional multi-head self-attention with one fused qkv projection: [B,N,D] -> [B,N,D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        batch, tokens, width = x_BND.shape
        qkv = self.qkv(x_BND).reshape(batch, tokens, 3, self.heads, self.head_width)  # [B,N,3,H,E]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B,H,N,E] each
        out = functional.scaled_dot_product_attention(q, k, v)  # [B,H,N,E]
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))  # [B,N,D]
        return projected


class Mlp(nn.Module):
    """Two linear layers with a GELU between, erf by default: [B,N,D] -> [B,N,D]."""

    def __init__(self, width: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate=approximate)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x_BND)))
        return out


class LayerScale(nn.Module):
    """Learned per-channel scale: [B,N,D] -> [B,N,D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: [B,N,D] -> [B,N,D]."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.attn = Attention(sizes.width, sizes.heads)
        self.ls1 = LayerScale(sizes.width) if sizes.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.mlp = Mlp(sizes.width, sizes.mlp_width)
        self.ls2 = LayerScale(sizes.width) if sizes.layer_scale else nn.Identity()

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.ls1(self.attn(self.norm1(x_BND)))
        out: Tensor = x_BND + self.ls2(self.mlp(self.norm2(x_BND)))
        return out


class VisionTower(nn.Module):
    """One tower up to the second-to-last block, whose raw patch outputs are CogACT's features: [B,3,S,S] -> [B,P,D].

    The last block, the final norm and any pooling head of the checkpoint never reach the policy and are not built.
    """

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.prefix_tokens = sizes.prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width)) if sizes.class_tokens else None
        self.reg_token = (
            nn.Parameter(torch.zeros(1, sizes.register_tokens, sizes.width)) if sizes.register_tokens else None
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.patches, sizes.width))
        self.patch_embed = PatchEmbed(sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth - 1))

    def embed(self, pixels_BCSS: Tensor) -> Tensor:
        """Return the tokens that enter the first block, prefix and patches: [B,3,S,S] -> [B,N,D]."""
        patches_BPD: Tensor = self.patch_embed(pixels_BCSS) + self.pos_embed
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if not prefix:
            return patches_BPD
        return torch.cat([*(token.expand(patches_BPD.shape[0], -1, -1) for token in prefix), patches_BPD], dim=1)

    def forward(self, pixels_BCSS: Tensor) -> Tensor:
        x_BND = self.embed(pixels_BCSS)
        for block in self.blocks:
            x_BND = block(x_BND)
        patches: Tensor = x_BND[:, self.prefix_tokens :]
        return patches


class VisionBackbone(nn.Module):
    """Both towers on one frame, joined on the channels, DINOv2 first: uint8 [B,S,S,3] -> [B,P,D_dino + D_siglip]."""

    def __init__(self, dino: TowerSizes, siglip: TowerSizes) -> None:
        super().__init__()
        self.dino_featurizer = VisionTower(dino)
        self.siglip_featurizer = VisionTower(siglip)

    def forward(self, image_BSSC: Tensor) -> Tensor:
        dino_pixels, siglip_pixels = normalize_pixels(image_BSSC)
        dtype = self.dino_featurizer.pos_embed.dtype
        dino = self.dino_featurizer(dino_pixels.to(dtype))
        siglip = self.siglip_featurizer(siglip_pixels.to(dtype))
        return torch.cat([dino, siglip], dim=2)


def normalize_pixels(image_BSSC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 [B,3,S,S] inputs of DINOv2 and SigLIP for a uint8 [B,S,S,3] frame, bit-equal to timm's."""
    # Cast first: a cast is the only operator that TensorRT has for bytes.
    pixels = image_BSSC.to(torch.float32).permute(0, 3, 1, 2) / 255.0  # [B,3,S,S]
    shape = (1, 3, 1, 1)
    device = image_BSSC.device
    dino_mean, dino_std = (
        torch.tensor(v, dtype=torch.float32, device=device).view(shape) for v in (DINO_MEAN, DINO_STD)
    )
    siglip_mean, siglip_std = (
        torch.tensor(v, dtype=torch.float32, device=device).view(shape) for v in (SIGLIP_MEAN, SIGLIP_STD)
    )
    return (pixels - dino_mean) / dino_std, (pixels - siglip_mean) / siglip_std

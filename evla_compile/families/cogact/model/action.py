"""The diffusion transformer (DiT) that predicts the noise of an action chunk, with the checkpoints' key names.

Shape legend: B batch, G guided batch (2B with classifier-free guidance, conditional half first, else B), A action steps
of a chunk, F action dimensions, Z width of the cognition feature, D width.
"""

import math

import torch
from torch import Tensor, nn

from evla_compile.families.cogact.model.vision import Attention, Mlp
from evla_compile.settings.sizes import ActionSizes


class ActionEmbedder(nn.Module):
    """Actions to tokens: [B,A,F] -> [B,A,D]."""

    def __init__(self, sizes: ActionSizes) -> None:
        super().__init__()
        self.linear = nn.Linear(sizes.action_width, sizes.width)

    def forward(self, x_BAF: Tensor) -> Tensor:
        out: Tensor = self.linear(x_BAF)
        return out


class TimestepEmbedder(nn.Module):
    """Index on the training noise schedule to a vector: [1] -> [1,D]."""

    def __init__(self, sizes: ActionSizes) -> None:
        super().__init__()
        self.frequencies = sizes.frequencies
        self.mlp = nn.Sequential(
            nn.Linear(sizes.frequencies, sizes.width), nn.SiLU(), nn.Linear(sizes.width, sizes.width)
        )

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.frequencies // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timestep.device)  # [half]
        angle = timestep[:, None].to(torch.float32) * torch.exp(-math.log(10000.0) * exponent / half)[None]  # [1,half]
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)  # [1,2*half]
        out: Tensor = self.mlp(wave.to(next(self.mlp.parameters()).dtype))
        return out


class ConditionEmbedder(nn.Module):
    """Cognition feature to a vector, [B,1,Z] -> [B,1,D]; holds the learned feature [1,Z] that means "no condition"."""

    def __init__(self, sizes: ActionSizes) -> None:
        super().__init__()
        self.linear = nn.Linear(sizes.condition_width, sizes.width)
        self.uncondition = nn.Parameter(torch.zeros(1, sizes.condition_width))

    def forward(self, z_B1Z: Tensor) -> Tensor:
        out: Tensor = self.linear(z_B1Z)
        return out


class DiTBlock(nn.Module):
    """Pre-norm block, norms without learned scale, tanh GELU: [G,1+A,D] -> [G,1+A,D]."""

    def __init__(self, sizes: ActionSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(sizes.width, sizes.heads)
        self.norm2 = nn.LayerNorm(sizes.width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(sizes.width, sizes.mlp_width, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class FinalLayer(nn.Module):
    """Tokens to predicted noise: [G,A,D] -> [G,A,F]."""

    def __init__(self, sizes: ActionSizes) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(sizes.width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(sizes.width, sizes.action_width)

    def forward(self, x_GAD: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm_final(x_GAD))
        return out


class DiT(nn.Module):
    """Noise prediction conditioned in context: timestep and cognition feature add up to one token more, the first.

    Upstream doubles its inputs for guidance; here the embedding of actions and timestep is computed once for both
    halves. The condition token is dropped in front of the final layer instead of behind it, which is the same
    arithmetic on fewer tokens.
    """

    def __init__(self, sizes: ActionSizes) -> None:
        super().__init__()
        self.x_embedder = ActionEmbedder(sizes)
        self.t_embedder = TimestepEmbedder(sizes)
        self.z_embedder = ConditionEmbedder(sizes)
        self.positional_embedding = nn.Parameter(torch.zeros(sizes.chunk + 1, sizes.width))
        self.blocks = nn.ModuleList(DiTBlock(sizes) for _ in range(sizes.depth))
        self.final_layer = FinalLayer(sizes)

    def forward(self, x_BAF: Tensor, timestep: Tensor, z_B1Z: Tensor, cfg_scale: float) -> Tensor:
        """Return the predicted noise [B,A,F], guided where `cfg_scale` is above 1.

        Args:
            x_BAF: noisy actions.
            timestep: index on the training schedule, shape [1].
            z_B1Z: cognition feature.
            cfg_scale: eps_uncond + cfg_scale * (eps_cond - eps_uncond); 1.0 runs the conditional half alone.
        """
        hidden = self.embed(x_BAF, timestep, z_B1Z, cfg_scale)
        for block in self.blocks:
            hidden = block(hidden)
        return self.read_noise(hidden[:, 1:], cfg_scale, x_BAF.dtype)

    def embed(self, x_BAF: Tensor, timestep: Tensor, z_B1Z: Tensor, cfg_scale: float) -> Tensor:
        """Return what enters the blocks, [G,1+A,D], the condition token first; arguments as of `forward`."""
        dtype = self.positional_embedding.dtype
        time_11D = self.t_embedder(timestep)[:, None]
        condition = self.z_embedder(z_B1Z.to(dtype)) + time_11D  # [B,1,D]
        tokens = self.x_embedder(x_BAF.to(dtype)) + self.positional_embedding[1:]  # [B,A,D]
        if cfg_scale > 1.0:
            unconditional = self.z_embedder(self.z_embedder.uncondition[None]) + time_11D  # [1,1,D]
            condition = torch.cat([condition, unconditional.expand(x_BAF.shape[0], -1, -1)])  # [G,1,D]
            tokens = torch.cat([tokens, tokens])  # [G,A,D]
        return torch.cat([condition + self.positional_embedding[:1], tokens], dim=1)  # [G,1+A,D]

    def read_noise(self, tokens_GAD: Tensor, cfg_scale: float, dtype: torch.dtype) -> Tensor:
        """Return the predicted noise [B,A,F] for the action tokens behind the blocks, guided as `forward` says."""
        noise: Tensor = self.final_layer(tokens_GAD).to(dtype)  # [G,A,F]
        if cfg_scale <= 1.0:
            return noise
        batch = noise.shape[0] // 2
        conditional_noise, unconditional_noise = noise[:batch], noise[batch:]
        return unconditional_noise + cfg_scale * (conditional_noise - unconditional_noise)


class ActionModel(nn.Module):
    """The action head's group of a checkpoint."""

    def __init__(self, sizes: ActionSizes) -> None:
        super().__init__()
        self.net = DiT(sizes)

    def forward(self, x_BAF: Tensor, timestep: Tensor, z_B1Z: Tensor, cfg_scale: float) -> Tensor:
        noise: Tensor = self.net(x_BAF, timestep, z_B1Z, cfg_scale)
        return noise

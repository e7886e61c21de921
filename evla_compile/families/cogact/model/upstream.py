"""CogACT as its public code runs it, unused work included: the baseline of every figure.

microsoft/CogACT computes much that no action depends on. Each vision tower runs its last block, whose result is
discarded. The language head scores every position for a token that is never read, and a key-value cache is filled for
it. Guidance doubles the whole input of the action head, which embeds timestep and cognition feature again in every
denoising step. The modules here do all of that and return what they compute, so that no removal of dead code can drop
it. What this package compiles is `model.policy.CogACT`.

Shape legend: B batch, C channels, S image side in pixels, P patches, N tokens of a tower, T text tokens, D decoder
width, V vocabulary, A action steps, F action dimensions, G guided batch (2B with classifier-free guidance, conditional
half first, else B), Z width of the cognition feature.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from evla_compile.families.cogact.model.action import ActionEmbedder, DiT
from evla_compile.families.cogact.model.language import LlamaDecoder, rotary_tables
from evla_compile.families.cogact.model.policy import Projector
from evla_compile.families.cogact.model.vision import Block, Mlp, VisionTower, normalize_pixels
from evla_compile.settings.config import CFG_SCALE
from evla_compile.settings.schedule import DDIM_STEPS, ddim_schedule
from evla_compile.settings.sizes import ActionSizes, LanguageSizes, ModelSizes, TowerSizes


class AttentionPool(nn.Module):
    """Weights of SigLIP's pooling head, which the checkpoint contains and upstream never runs."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.q = nn.Linear(sizes.width, sizes.width)
        self.kv = nn.Linear(sizes.width, 2 * sizes.width)
        self.proj = nn.Linear(sizes.width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.mlp = Mlp(sizes.width, sizes.mlp_width)


class UpstreamTower(VisionTower):
    """One tower with all its blocks: [B,3,S,S] -> second-to-last block's patches [B,P,D], last block's tokens [B,N,D].

    The final norm is there for its weights and never runs.
    """

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__(sizes)
        self.blocks.append(Block(sizes))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)

    def forward(self, pixels_BCSS: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # one result more
        x_BND = self.embed(pixels_BCSS)
        for block in self.blocks[:-1]:
            x_BND = block(x_BND)
        return x_BND[:, self.prefix_tokens :], self.blocks[-1](x_BND)


class UpstreamVision(nn.Module):
    """Both towers: uint8 [B,S,S,3] -> features [B,P,D_dino + D_siglip], last block's tokens of DINOv2 and of SigLIP."""

    def __init__(self, dino: TowerSizes, siglip: TowerSizes) -> None:
        super().__init__()
        self.dino_featurizer = UpstreamTower(dino)
        self.siglip_featurizer = UpstreamTower(siglip)
        self.siglip_featurizer.attn_pool = AttentionPool(siglip)

    def forward(self, image_BSSC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dino_pixels, siglip_pixels = normalize_pixels(image_BSSC)
        dtype = self.dino_featurizer.pos_embed.dtype
        dino, dino_last = self.dino_featurizer(dino_pixels.to(dtype))
        siglip, siglip_last = self.siglip_featurizer(siglip_pixels.to(dtype))
        return torch.cat([dino, siglip], dim=2), dino_last, siglip_last


class UpstreamDecoder(LlamaDecoder):
    """The decoder with the key-value cache that `generate` fills: patches [B,P,D] and ids [B,T] -> [B,P+T,D]."""

    def forward(self, patches_BPD: Tensor, input_ids_BT: Tensor) -> Tensor:
        text_BTD = self.embed_tokens(input_ids_BT)
        hidden = torch.cat([text_BTD[:, :1], patches_BPD.to(text_BTD.dtype), text_BTD[:, 1:]], dim=1)
        rotary, cache = rotary_tables(hidden, self.head_width), DynamicCache()
        for layer in self.layers:
            hidden = layer(
                hidden, attention_mask=None, past_key_values=cache, use_cache=True, position_embeddings=rotary
            )
        normed: Tensor = self.norm(hidden)
        return normed


class UpstreamCausalLM(nn.Module):
    """Decoder and language head: patches [B,P,D] and ids [B,T] -> hidden states [B,P+T,D], logits [B,P+T,V]."""

    def __init__(self, sizes: LanguageSizes) -> None:
        super().__init__()
        self.model = UpstreamDecoder(sizes)
        self.lm_head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, patches_BPD: Tensor, input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model(patches_BPD, input_ids_BT)
        return hidden, self.lm_head(hidden)


class UpstreamLanguage(nn.Module):
    """The language model's group of a checkpoint."""

    def __init__(self, sizes: LanguageSizes) -> None:
        super().__init__()
        self.llm = UpstreamCausalLM(sizes)

    def forward(self, patches_BPD: Tensor, input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        hidden, logits = self.llm(patches_BPD, input_ids_BT)
        return hidden, logits


class UpstreamDiT(DiT):
    """The diffusion transformer on a doubled batch, its condition token dropped behind the final layer."""

    def __init__(self, sizes: ActionSizes) -> None:
        super().__init__(sizes)
        self.history_embedder = ActionEmbedder(sizes)

    def forward(self, x_GAF: Tensor, timestep_G: Tensor, z_G1Z: Tensor, cfg_scale: float) -> Tensor:
        """Return the predicted noise [G,A,F], with guidance the same in both halves.

        Args:
            x_GAF: noisy actions; with guidance only the first half is read.
            timestep_G: index on the training schedule.
            z_G1Z: cognition feature; with guidance the learned "no condition" in the second half.
            cfg_scale: eps_uncond + cfg_scale * (eps_cond - eps_uncond); 1.0 for no guidance.
        """
        guided, half = cfg_scale > 1.0, len(x_GAF) // 2
        x = torch.cat([x_GAF[:half], x_GAF[:half]]) if guided else x_GAF  # [G,A,F]
        condition = self.t_embedder(timestep_G)[:, None] + self.z_embedder(z_G1Z)  # [G,1,D]
        tokens = self.x_embedder(x.to(self.positional_embedding.dtype))  # [G,A,D]
        hidden = torch.cat([condition, tokens], dim=1) + self.positional_embedding  # [G,1+A,D]
        for block in self.blocks:
            hidden = block(hidden)
        noise: Tensor = self.final_layer(hidden)[:, 1:].to(x_GAF.dtype)  # [G,A,F]
        if not guided:
            return noise
        mixed = noise[half:] + cfg_scale * (noise[:half] - noise[half:])  # [B,A,F]
        return torch.cat([mixed, mixed])


class UpstreamActionModel(nn.Module):
    """The action head's group of a checkpoint; takes the timestep as a number."""

    def __init__(self, sizes: ActionSizes) -> None:
        super().__init__()
        self.net = UpstreamDiT(sizes)

    def forward(self, x_GAF: Tensor, timestep: int, z_G1Z: Tensor, cfg_scale: float) -> Tensor:
        timestep_G = torch.full((len(x_GAF),), float(timestep), device=x_GAF.device)
        noise: Tensor = self.net(x_GAF, timestep_G, z_G1Z, cfg_scale)
        return noise


class UpstreamCogACT(nn.Module):
    """The policy as microsoft/CogACT runs it; its state dict has every key and shape of the official files.

    Attributes:
        sizes: sizes of every module.
    """

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.vision_backbone = UpstreamVision(sizes.dino, sizes.siglip)
        self.projector = Projector(sizes.projector)
        self.llm_backbone = UpstreamLanguage(sizes.language)
        self.action_model = UpstreamActionModel(sizes.action)

    def forward(
        self,
        image: Tensor,
        input_ids: Tensor,
        noise: Tensor,
        *,
        ddim_steps: int = DDIM_STEPS,
        cfg_scale: float = CFG_SCALE,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return everything that upstream computes for one action chunk, the samples first.

        On CUDA everything in front of the action head runs under bfloat16 autocast, for weights of any dtype;
        the action head runs in its own. The sampler is DDIM with eta 0, on the doubled batch.

        Args:
            image: uint8 [B,S,S,3].
            input_ids: int64 [B,T], without padding.
            noise: float32 [B,A,F].
            ddim_steps: denoising steps.
            cfg_scale: guidance scale; 1.0 for none.

        Returns:
            Raw samples [B,A,F], logits [B,P+T,V], and the last block's tokens of DINOv2 and of SigLIP, [B,N,D] each.

        Raises:
            ValueError: `ddim_steps` has no integer stride.
        """
        with _mixed_precision(image):
            patches, dino_last, siglip_last = self.vision_backbone(image)
            hidden, logits = self.llm_backbone(self.projector(patches), input_ids)
        net = self.action_model.net
        x, z = noise, hidden[:, -1:].to(net.positional_embedding.dtype)  # [B,A,F], [B,1,Z]
        if cfg_scale > 1.0:  # [G,A,F], [G,1,Z]
            x, z = torch.cat([x, x]), torch.cat([z, net.z_embedder.uncondition.expand_as(z)])
        for step in ddim_schedule(ddim_steps):
            predicted = self.action_model(x, step.timestep, z, cfg_scale)
            x = step.sample * x + step.noise * predicted
        return x[: len(noise)], logits, dino_last, siglip_last


def _mixed_precision(image: Tensor) -> AbstractContextManager[object]:
    # a graph keeps the weights' own dtypes: export would wrap the whole region in one higher-order operator
    if image.is_cuda and not torch.compiler.is_exporting():
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()

"""CogACT's modules for training: with initial weights, the diffusion loss, and an auxiliary head.

Shape legend: B batch, S image side, T text tokens, A action steps, R noise draws per frame.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from evla_compile.families.cogact.model.language import cognition_token, rotary_tables
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.processor import Processor
from evla_compile.passes.select_tokens import SCORING_LAYER
from evla_compile.settings.schedule import DIFFUSION_STEPS, cumulative_alphas
from evla_compile.settings.sizes import ACTION_WIDTH, ActionSizes, LanguageSizes, ModelSizes, TowerSizes

FIRST_DROPPED = SCORING_LAYER + 1
"""The first decoder layer that training may skip, and before which it may drop visual tokens: compilation selects them
there."""
FEWEST_PATCHES = 0.2
"""Least share of the visual tokens that training keeps."""
CONDITION_DROPOUT = 0.1
"""Share of cognition features replaced by the learned "no condition", for classifier-free guidance."""
STATE_WIDTH = 9
"""Numbers that the auxiliary head predicts: positions of gripper, object and goal."""

_EMBEDDINGS = ("pos_embed", "cls_token", "reg_token", "positional_embedding", "uncondition")


def demo_sizes(vocabulary: int, chunk: int) -> ModelSizes:
    """Return the sizes of the demo policy: CogACT's form at 15 M parameters, 112 px, 64 visual tokens, 12 layers."""
    tower = TowerSizes(width=192, depth=4, heads=3, mlp_width=768, patches=64)
    return ModelSizes(
        dino=replace(tower, class_tokens=1, register_tokens=4, layer_scale=True),
        siglip=tower,
        projector=(384, 768, 256, 256),
        language=LanguageSizes(width=256, layers=12, heads=4, kv_heads=4, mlp_width=688, vocabulary=vocabulary),
        action=ActionSizes(
            width=192,
            depth=4,
            heads=4,
            mlp_width=768,
            condition_width=256,
            frequencies=256,
            chunk=chunk,
            action_width=ACTION_WIDTH,
        ),
    )


class TrainingPolicy(nn.Module):
    """A policy and its loss: CogACT's mean squared error on the noise, and an auxiliary regression.

    The auxiliary head reads the positions of gripper, object and goal off the cognition token. It teaches the vision
    towers, which start from random weights here, where things are; it is not part of the policy that is exported.

    Two regularisers, both off by default, skip work during training: stochastic depth (G. Huang et al., ECCV 2016; A.
    Fan et al., ICLR 2020), and patch dropout (Y. Liu et al., WACV 2023) in front of the third decoder layer.

    Attributes:
        policy: the CogACT policy that is trained.
    """

    def __init__(
        self, sizes: ModelSizes, processor: Processor, *, draws: int, layer_drop: float = 0.0, patch_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.layer_drop, self.patch_drop = layer_drop, patch_drop
        self.policy = CogACT(sizes, processor)
        self.state_head = nn.Sequential(nn.Linear(sizes.language.width, 256), nn.GELU(), nn.Linear(256, STATE_WIDTH))
        self.draws = draws
        alphas = torch.tensor(cumulative_alphas(), dtype=torch.float64)
        self.signal, self.disturbance = (table.float() for table in (alphas.sqrt(), (1.0 - alphas).sqrt()))
        initialize(self.policy)

    def forward(
        self, image: Tensor, input_ids: Tensor, text_length: Tensor, chunk: Tensor, state: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return the noise loss and the auxiliary loss.

        Args:
            image: uint8 [B,S,S,3].
            input_ids: int64 [B,T], right-padded.
            text_length: int64 [B].
            chunk: normalised actions [B,A,7].
            state: normalised positions [B,9].
            seed: decides noise, timesteps and dropped conditions.
        """
        generator = torch.Generator().manual_seed(seed)
        condition = self._cognition(image, input_ids, text_length, generator)
        auxiliary = functional.smooth_l1_loss(self.state_head(condition[:, 0]), state)
        actions = chunk.repeat(self.draws, 1, 1)
        noise = torch.randn(actions.shape, generator=generator).to(actions)
        timestep = torch.randint(DIFFUSION_STEPS, (len(actions),), generator=generator).to(actions.device)
        dropped = (torch.rand((len(actions), 1, 1), generator=generator) < CONDITION_DROPOUT).to(actions.device)
        unconditional = self.policy.action_model.net.z_embedder.uncondition[None]
        condition = torch.where(dropped, unconditional, condition.repeat(self.draws, 1, 1))
        signal, disturbance = (table.to(actions)[timestep][:, None, None] for table in (self.signal, self.disturbance))
        predicted = self.policy.action_model(signal * actions + disturbance * noise, timestep, condition, 1.0)
        return functional.mse_loss(predicted, noise), auxiliary

    def _cognition(self, image: Tensor, input_ids: Tensor, text_length: Tensor, generator: torch.Generator) -> Tensor:
        """Return `CogACT.cognition`, with layers skipped for the whole batch and patches dropped row by row."""
        if not self.layer_drop and not self.patch_drop:
            return self.policy.cognition(image, input_ids, text_length)
        decoder = self.policy.llm_backbone.llm.model
        patches = self.policy.projector(self.policy.vision_backbone(image))
        text = decoder.embed_tokens(input_ids)
        hidden = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
        rotary = rotary_tables(hidden, decoder.head_width)
        for index, layer in enumerate(decoder.layers):
            if index == FIRST_DROPPED and torch.rand((), generator=generator) < self.patch_drop:
                hidden, rotary = _drop_patches(hidden, rotary, patches.shape[1], generator)
            if index < FIRST_DROPPED or torch.rand((), generator=generator) >= self.layer_drop:
                hidden = layer(hidden, attention_mask=None, use_cache=False, position_embeddings=rotary)
        return cognition_token(decoder.norm(hidden), text_length, input_ids.shape[1])


def _drop_patches(
    hidden: Tensor, rotary: tuple[Tensor, Tensor], patches: int, generator: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Keep as many random patches in every row, in their order and with their rotary positions."""
    batch, length, width = hidden.shape
    fewest = math.ceil(FEWEST_PATCHES * patches)
    count = int(torch.randint(fewest, patches + 1, (), generator=generator))
    chosen = torch.rand((batch, patches), generator=generator).argsort(dim=1)[:, :count].sort(dim=1).values + 1
    behind = torch.arange(patches + 1, length).expand(batch, -1)
    kept = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), chosen, behind], dim=1).to(hidden.device)[..., None]
    tables = [table.expand(batch, -1, -1).gather(1, kept.expand(-1, -1, table.shape[2])) for table in rotary]
    return hidden.gather(1, kept.expand(-1, -1, width)), (tables[0], tables[1])


def initialize(policy: CogACT) -> None:
    """Give a policy its initial weights, from torch's global generator.

    Linear layers have PyTorch's own, embeddings and positions a deviation of 0.02; residual branches of the decoder are
    scaled by 1/sqrt(2 L), and the action head's final layer starts at zero, as in DiT.
    """
    layers = len(policy.llm_backbone.llm.model.layers)
    for name, parameter in policy.named_parameters():
        leaf = name.split(".")[-1]
        if "embed_tokens" in name or leaf in _EMBEDDINGS:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            with torch.no_grad():
                parameter.mul_(1.0 / math.sqrt(2.0 * layers))
        elif "final_layer.linear" in name:
            nn.init.zeros_(parameter)

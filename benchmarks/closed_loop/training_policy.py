"""CogACT's modules with what training adds: initial weights, the diffusion loss, and an auxiliary head.

Shape legend: B batch, S image side, T text tokens, A action steps, R noise draws per frame.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from evla_compile.config import DIFFUSION_STEPS
from evla_compile.model.action import ActionSizes
from evla_compile.model.diffusion import cumulative_alphas
from evla_compile.model.language import LanguageSizes
from evla_compile.model.policy import CogACT, ModelSizes
from evla_compile.model.vision import TowerSizes
from evla_compile.processor import ACTION_WIDTH, Processor

CONDITION_DROPOUT = 0.1
"""Share of cognition features replaced by the learned "no condition", for classifier-free guidance."""
STATE_WIDTH = 9
"""Numbers that the auxiliary head predicts: positions of gripper, object and goal."""


def demo_sizes(vocabulary: int, chunk: int) -> ModelSizes:
    """Return the sizes of the demo policy: CogACT's form at 15 M parameters, 112 px, 64 visual tokens, 12 layers."""
    tower = {"width": 192, "depth": 4, "heads": 3, "mlp_width": 768, "patches": 64}
    return ModelSizes(
        dino=TowerSizes(**tower, class_tokens=1, register_tokens=4, layer_scale=True),
        siglip=TowerSizes(**tower),
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

    Attributes:
        policy: the CogACT policy that is trained.
    """

    def __init__(self, sizes: ModelSizes, processor: Processor, *, draws: int) -> None:
        super().__init__()
        self.policy = CogACT(sizes, processor)
        self.state_head = nn.Sequential(nn.Linear(sizes.language.width, 256), nn.GELU(), nn.Linear(256, STATE_WIDTH))
        self.draws = draws
        alphas = torch.tensor(cumulative_alphas(), dtype=torch.float64)
        self.register_buffer("signal", alphas.sqrt().float(), persistent=False)
        self.register_buffer("disturbance", (1.0 - alphas).sqrt().float(), persistent=False)
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
        condition = self.policy.cognition(image, input_ids, text_length)
        auxiliary = functional.smooth_l1_loss(self.state_head(condition[:, 0]), state)
        generator = torch.Generator().manual_seed(seed)
        actions = chunk.repeat(self.draws, 1, 1)
        noise = torch.randn(actions.shape, generator=generator).to(actions)
        timestep = torch.randint(DIFFUSION_STEPS, (len(actions),), generator=generator).to(actions.device)
        dropped = (torch.rand((len(actions), 1, 1), generator=generator) < CONDITION_DROPOUT).to(actions.device)
        unconditional = self.policy.action_model.net.z_embedder.uncondition[None]
        condition = torch.where(dropped, unconditional, condition.repeat(self.draws, 1, 1))
        signal, disturbance = (table[timestep][:, None, None] for table in (self.signal, self.disturbance))
        predicted = self.policy.action_model(signal * actions + disturbance * noise, timestep, condition, 1.0)
        return functional.mse_loss(predicted, noise), auxiliary


def initialize(policy: CogACT) -> None:
    """Give a policy its initial weights, from torch's global generator: PyTorch's own for linear layers, and

    embeddings and positions of 0.02, residual branches of the decoder scaled by 1/sqrt(2 L), and an action head whose
    final layer starts at zero, as in DiT.
    """
    layers = len(policy.llm_backbone.llm.model.layers)
    for name, parameter in policy.named_parameters():
        leaf = name.split(".")[-1]
        if leaf in ("pos_embed", "cls_token", "reg_token", "positional_embedding", "uncondition"):
            nn.init.normal_(parameter, std=0.02)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            with torch.no_grad():
                parameter.mul_(1.0 / math.sqrt(2.0 * layers))
        elif "final_layer.linear" in name:
            nn.init.zeros_(parameter)

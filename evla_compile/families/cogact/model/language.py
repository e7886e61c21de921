"""The Llama decoder: transformers' layers, driven by a plain loop of our own.

transformers' own `LlamaModel.forward` builds causal masks with some forty operators that detect packed sequences; the
loop here passes its layers what they need, so the captured graph contains the arithmetic alone.

Shape legend: B batch, P patches, T text tokens (BOS and padding included), S = P + T sequence, D width.
"""

import torch
from torch import Tensor, nn

from evla_compile.settings.sizes import LanguageSizes

ROPE_THETA = 10000.0
NORM_EPS = 1e-5


class LlamaDecoder(nn.Module):
    """Embedding, decoder layers and final norm, under the names of `LlamaModel`."""

    def __init__(self, sizes: LanguageSizes) -> None:
        # Imported here: transformers takes seconds, and reading a checkpoint's sizes builds no decoder.
        from transformers.models.llama.configuration_llama import LlamaConfig  # noqa: PLC0415
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm  # noqa: PLC0415

        super().__init__()
        config = LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=sizes.mlp_width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            rms_norm_eps=NORM_EPS,
        )
        config._attn_implementation = "sdpa"
        self.head_width = sizes.width // sizes.heads
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, layer_idx=i) for i in range(sizes.layers))
        self.norm = LlamaRMSNorm(sizes.width, eps=NORM_EPS)

    def forward(self, patches_BPD: Tensor, input_ids_BT: Tensor) -> Tensor:
        """Return the final hidden states after the norm, [B,S,D], of BOS, the patches, then the rest of the text."""
        text_BTD = self.embed_tokens(input_ids_BT)
        hidden_BSD = torch.cat([text_BTD[:, :1], patches_BPD.to(text_BTD.dtype), text_BTD[:, 1:]], dim=1)
        rotary = rotary_tables(hidden_BSD, self.head_width)
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD, attention_mask=None, use_cache=False, position_embeddings=rotary)
        normed: Tensor = self.norm(hidden_BSD)
        return normed


class CausalLM(nn.Module):
    """The decoder under the name that the checkpoints use, without the language head, which CogACT never runs."""

    def __init__(self, sizes: LanguageSizes) -> None:
        super().__init__()
        self.model = LlamaDecoder(sizes)


class LanguageBackbone(nn.Module):
    """The language model's group of a checkpoint: patches [B,P,D] and ids [B,T] -> hidden states [B,S,D]."""

    def __init__(self, sizes: LanguageSizes) -> None:
        super().__init__()
        self.llm = CausalLM(sizes)

    def forward(self, patches_BPD: Tensor, input_ids_BT: Tensor) -> Tensor:
        hidden: Tensor = self.llm.model(patches_BPD, input_ids_BT)
        return hidden


def rotary_tables(hidden_BSD: Tensor, head_width: int, theta: float = ROPE_THETA) -> tuple[Tensor, Tensor]:
    """Return the rotary cosines and sines [1,S,head_width] in the dtype of the hidden states.

    The angles are always computed in float32, from no stored buffer: an `inv_freq` cast to bfloat16 along with the
    weights would be off by 0.34 rad at position 280.
    """
    device = hidden_BSD.device
    exponent = torch.arange(0, head_width, 2, dtype=torch.int64, device=device).to(torch.float32) / head_width
    frequency = 1.0 / (theta**exponent)  # [head_width / 2]
    position = torch.arange(hidden_BSD.shape[1], dtype=torch.int64, device=device).to(torch.float32)  # [S]
    angle = position[None, :, None] * frequency[None, None, :]  # [1,S,head_width / 2]
    angle = torch.cat([angle, angle], dim=-1)  # [1,S,head_width]
    return angle.cos().to(hidden_BSD.dtype), angle.sin().to(hidden_BSD.dtype)


def cognition_token(hidden_BSD: Tensor, text_length_B: Tensor, text_budget: int) -> Tensor:
    """Gather the hidden state of the last real text token (EOS), CogACT's cognition feature: [B,S,D] -> [B,1,D].

    The text is the end of the sequence, and the index counts within it: so it is right for any number of visual tokens.
    """
    text = hidden_BSD[:, 1 - text_budget :]  # [B,T-1,D]: the text behind the image, without BOS
    index = (text_length_B - 2)[:, None, None].expand(-1, 1, text.shape[2])  # [B,1,D]
    return text.gather(1, index)

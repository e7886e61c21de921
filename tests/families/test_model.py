"""The eager policy: rows do not touch each other, padding does not matter, guidance and rotary tables are right."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evla_compile.families.cogact.model.action import TimestepEmbedder
from evla_compile.families.cogact.model.language import cognition_token, rotary_tables
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.families.cogact.model.vision import VisionTower, normalize_pixels
from evla_compile.settings.schedule import ddim_schedule
from evla_compile.settings.sizes import ModelSizes
from evla_compile.settings.tolerances import TOLERANCES, relative_error

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def test_a_row_of_a_batch_equals_that_row_alone(small_policy: CogACT, small_inputs: Inputs) -> None:
    together = small_policy.sample(*small_inputs, ddim_steps=3)
    for row in range(2):
        alone = small_policy.sample(*(value[row : row + 1] for value in small_inputs), ddim_steps=3)
        assert relative_error(together[row].numpy(), alone[0].numpy()) <= TOLERANCES.samples


def test_a_padded_row_equals_the_row_without_padding(small_policy: CogACT, small_inputs: Inputs) -> None:
    image, input_ids, text_length, _ = (value[:1] for value in small_inputs)
    padded = small_policy.cognition(image, input_ids, text_length)
    bare = small_policy.cognition(image, input_ids[:, : int(text_length)], text_length)
    assert relative_error(padded.numpy(), bare.numpy()) <= TOLERANCES.cognition


def test_the_content_of_padding_does_not_matter(small_policy: CogACT, small_inputs: Inputs) -> None:
    image, input_ids, text_length, _ = small_inputs
    other = input_ids.clone()
    other[0, 6:] = 63 - other[0, 6:]
    assert torch.equal(
        small_policy.cognition(image, input_ids, text_length), small_policy.cognition(image, other, text_length)
    )


def test_the_cognition_token_is_the_last_real_one_of_each_row() -> None:
    hidden = torch.arange(2 * 12, dtype=torch.float32).reshape(2, 12, 1)  # BOS, 6 patches, 5 more text tokens
    assert cognition_token(hidden, torch.tensor([3, 6]), 6).flatten().tolist() == [12 - 4, 12 + 11]


def test_the_decoder_sees_bos_then_the_patches_then_the_text(small_policy: CogACT, small_inputs: Inputs) -> None:
    image, input_ids, _, _ = small_inputs
    patches = small_policy.projector(small_policy.vision_backbone(image))
    decoder = small_policy.llm_backbone.llm.model
    seen: list[Tensor] = []
    handle = decoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    decoder(patches, input_ids)
    handle.remove()
    text = decoder.embed_tokens(input_ids)
    assert torch.equal(seen[0][:, 0], text[:, 0])
    assert torch.equal(seen[0][:, 1:17], patches)
    assert torch.equal(seen[0][:, 17:], text[:, 1:])


def test_guidance_moves_away_from_the_unconditional_prediction(small_policy: CogACT, small_inputs: Inputs) -> None:
    noise, time = small_inputs[3], torch.tensor([30.0])
    condition = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(5))
    head = small_policy.action_model
    conditional = head(noise, time, condition, 1.0)
    unconditional = head(noise, time, head.net.z_embedder.uncondition[None].expand(2, -1, -1), 1.0)
    for scale in (1.5, 7.0):
        guided = unconditional + scale * (conditional - unconditional)
        found = head(noise, time, condition, scale)
        assert relative_error(found.numpy(), guided.numpy()) <= TOLERANCES.samples


def test_the_timestep_embedding_has_its_cosines_first(small_sizes: ModelSizes) -> None:
    sizes = replace(small_sizes.action, frequencies=6, width=4)
    embedder = TimestepEmbedder(sizes).requires_grad_(False)
    angles = [30.0 * 10000 ** (-i / 3) for i in range(3)]
    wave = torch.tensor([angles], dtype=torch.float64)
    expected = embedder.mlp(torch.cat([wave.cos(), wave.sin()], dim=1).to(torch.float32))
    assert torch.allclose(embedder(torch.tensor([30.0])), expected, atol=1e-5, rtol=0)


def test_sampling_is_the_schedule_over_the_noise_predictions(small_policy: CogACT, small_inputs: Inputs) -> None:
    *observation, x = small_inputs
    condition = small_policy.cognition(*observation)
    for step in ddim_schedule(4):
        x = step.sample * x + step.noise * small_policy.action_model(
            x, torch.tensor([float(step.timestep)]), condition, 1.0
        )
    assert torch.equal(small_policy.sample(*small_inputs, ddim_steps=4, cfg_scale=1.0), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_come_from_float32_angles(dtype: torch.dtype) -> None:
    width, length = 8, 300
    cos, sin = rotary_tables(torch.zeros(1, length, 32, dtype=dtype), width)
    frequency = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.cat([frequency, frequency])
    # bfloat16 angles would be off by as much as a radian at position 299
    exact = torch.stack([angle.cos(), angle.sin()])
    found = torch.stack([cos[0], sin[0]])
    assert found.dtype == dtype
    bound = 1e-4 if dtype == torch.float32 else 2**-8
    assert float((found.to(torch.float64) - exact).abs().max()) <= bound


def test_pixels_are_scaled_and_normalised_for_each_tower() -> None:
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 14, 14, 3)
    dino, siglip = normalize_pixels(image)
    assert dino.shape == siglip.shape == (1, 3, 14, 14)
    assert dino[0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, (0.2 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert siglip[0, :, 0, 0].tolist() == pytest.approx([-1.0, -0.6, 1.0])


def test_a_tower_drops_its_prefix_tokens_and_its_last_block(small_policy: CogACT) -> None:
    tower = small_policy.vision_backbone.dino_featurizer
    assert isinstance(tower, VisionTower)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    tokens = tower.patch_embed(pixels) + tower.pos_embed  # the prefix gets no position
    prefix = torch.cat([tower.cls_token, tower.reg_token], dim=1)  # type: ignore[list-item]  # present in this tower
    assert len(tower.blocks) == 1  # of a checkpoint's two
    assert torch.equal(tower(pixels), tower.blocks[0](torch.cat([prefix, tokens], dim=1))[:, 3:])


def test_image_side_and_patch_count_follow_from_the_towers(small_sizes: ModelSizes) -> None:
    assert (small_sizes.image_side, small_sizes.patches) == (56, 16)
    wider = replace(small_sizes, dino=replace(small_sizes.dino, patches=256))
    assert wider.image_side == 224

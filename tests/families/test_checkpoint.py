import json
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, processors
from torch import Tensor

from evla_compile.errors import CheckpointError, UnsupportedModelError
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.settings.schedule import ddim_schedule

Groups = dict[str, dict[str, Tensor]]
Edit = Callable[[Groups], None]
TEXT_TOKENS = 32


@pytest.fixture(scope="session")
def policy(tiny_policy: CogACT) -> CogACT:
    return tiny_policy


@pytest.fixture(scope="session")
def stored(tiny_checkpoint: Path) -> Groups:
    groups: Groups = torch.load(checkpoint_file(tiny_checkpoint))["model"]
    return groups


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A run directory of the tiny model whose files a test may replace."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for file in (checkpoint_file(tiny_checkpoint), *tiny_checkpoint.glob("*.json")):
        (folder / file.relative_to(tiny_checkpoint)).symlink_to(file)
    return folder


def checkpoint_file(run: Path) -> Path:
    (file,) = run.glob("checkpoints/*.pt")
    return file


def replace(file: Path, contents: bytes) -> None:
    file.unlink()
    file.write_bytes(contents)


def save(run: Path, contents: object) -> None:
    file = checkpoint_file(run)
    file.unlink()
    torch.save(contents, file)


def rewrite(run: Path, stored: Groups, edit: Edit) -> Path:
    """Write an edited copy of the tiny model's tensors into a run directory."""
    groups = {group: dict(tensors) for group, tensors in stored.items()}
    edit(groups)
    save(run, {"model": groups})
    return run


def configure(run: Path, **settings: object) -> None:
    heads = {"dino": 3, "siglip": 2, "llm": 4, "dit": 4}
    replace(run / "config.json", json.dumps({"evla_compile": {"heads": heads} | settings}).encode())


def assert_same_parameters(policy: CogACT, stored: Groups) -> None:
    state = policy.state_dict()
    assert state
    for name, tensor in state.items():
        group, key = name.split(".", 1)
        assert torch.equal(tensor, stored[group][key]), name


def relative_deviation(found: Tensor, expected: NDArray[np.float32]) -> float:
    reference = torch.from_numpy(expected)
    assert found.shape == reference.shape
    return float((found - reference).abs().max() / reference.abs().max())


def test_parameters_are_bit_equal_to_the_file(policy: CogACT, stored: Groups) -> None:
    assert_same_parameters(policy, stored)


def test_a_checkpoint_repacked_by_another_tool_loads_the_same(run: Path, stored: Groups) -> None:
    file = checkpoint_file(run)
    with zipfile.ZipFile(file) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    file.unlink()
    with zipfile.ZipFile(file, "w") as archive:
        for name, contents in members:
            archive.writestr(name, contents)
    assert_same_parameters(load(run), stored)


def test_a_loaded_policy_is_ready_for_inference(policy: CogACT) -> None:
    assert not policy.training
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    assert not any(tensor.is_meta for tensor in (*policy.parameters(), *policy.buffers()))


def test_tensors_that_need_no_cast_stay_in_the_file_mapped_without_setting_memory_aside(tiny_checkpoint: Path) -> None:
    """A private mapping of 30 GB for which memory is set aside is refused by Linux where less is installed."""
    policy, file = load(tiny_checkpoint), str(checkpoint_file(tiny_checkpoint).resolve())
    entries = re.findall(
        rf"^(\w+)-(\w+) (\S+) .*{re.escape(file)}\n(?:\w+: .*\n)*?VmFlags: (.*)$",
        Path("/proc/self/smaps").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    spans = [(int(low, 16), int(high, 16)) for low, high, *_ in entries]
    assert {permissions for *_, permissions, _ in entries} == {"rw-p"}
    assert all("nr" in flags.split() for *_, flags in entries)
    for name, parameter in policy.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in spans), name


def test_what_is_written_into_a_policy_goes_to_its_own_memory_and_never_to_the_file(
    tiny_checkpoint: Path, stored: Groups
) -> None:
    file = checkpoint_file(tiny_checkpoint)
    written, policy, reader = file.read_bytes(), load(tiny_checkpoint), load(tiny_checkpoint)
    doubled = {name: 2 * tensor for name, tensor in policy.state_dict().items()}
    policy.load_state_dict(doubled)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(2.0)
            parameter.data.add_(1.0)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, 2 * doubled[name] + 1.0), name
    assert file.read_bytes() == written
    assert_same_parameters(reader, stored)


LORA_TARGETS = [f"llm.model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(6) for name in "qv"]


def test_a_lora_merged_into_a_loaded_policy_acts_like_a_checkpoint_that_was_merged(
    run: Path, stored: Groups, golden: dict[str, Any], frame: Image.Image
) -> None:
    generator, rank, scale = torch.Generator().manual_seed(0), 4, 0.5
    group = stored["llm_backbone"]
    lora = {
        f"llm_backbone.{key}": (
            torch.randn(rank, group[key].shape[1], generator=generator) / 8,
            torch.randn(group[key].shape[0], rank, generator=generator) / 8,
        )
        for key in LORA_TARGETS
    }
    policy, case = load(run), golden["cases"][0]
    arguments = (*inputs(policy, case, frame), torch.zeros(1, 16, 7))
    before = policy.sample(*arguments, ddim_steps=2)
    with torch.no_grad():
        for name, (a, b) in lora.items():
            policy.get_parameter(name).add_(scale * (b @ a))

    def merge(groups: Groups) -> None:
        for key in LORA_TARGETS:
            a, b = lora[f"llm_backbone.{key}"]
            groups["llm_backbone"][key] = groups["llm_backbone"][key] + scale * (b @ a)

    expected = load(rewrite(run, stored, merge)).sample(*arguments, ddim_steps=2)
    assert torch.equal(policy.sample(*arguments, ddim_steps=2), expected)
    assert not torch.allclose(before, expected, rtol=1e-3)


def test_the_condition_is_as_wide_as_the_decoder_rather_than_4096(policy: CogACT) -> None:
    assert policy.action_model.net.z_embedder.uncondition.shape == (1, policy.sizes.language.width) == (1, 64)


def test_the_path_of_the_checkpoint_itself_loads_the_same(tiny_checkpoint: Path, stored: Groups) -> None:
    assert_same_parameters(load(str(checkpoint_file(tiny_checkpoint))), stored)


def test_bfloat16_leaves_the_action_head_in_float32(tiny_checkpoint: Path, stored: Groups) -> None:
    policy = load(tiny_checkpoint, dtype=torch.bfloat16)
    for name, parameter in policy.named_parameters():
        group, key = name.split(".", 1)
        dtype = torch.float32 if group == "action_model" else torch.bfloat16
        assert parameter.dtype == dtype, name
        assert torch.equal(parameter, stored[group][key].to(dtype)), name


def test_a_bfloat16_policy_stays_near_the_float32_one(
    tiny_checkpoint: Path, golden: dict[str, Any], golden_dir: Path, frame: Image.Image
) -> None:
    policy = load(tiny_checkpoint, dtype=torch.bfloat16)
    image, input_ids, text_length = inputs(policy, golden["cases"][0], frame)
    with torch.no_grad():
        cognition = policy.cognition(image, input_ids, text_length)[:, 0].float()
    assert relative_deviation(cognition, np.load(golden_dir / "case0.npz")["cognition"]) < 0.1


def test_weights_stored_in_bfloat16_are_widened(run: Path, stored: Groups) -> None:
    def narrow(groups: Groups) -> None:
        for tensors in groups.values():
            tensors.update({key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()})

    policy = load(rewrite(run, stored, narrow))
    weight = policy.get_parameter("projector.projector.0.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, stored["projector"]["projector.0.weight"].bfloat16().float())


def test_tensors_that_inference_never_reads_may_be_there(run: Path, stored: Groups) -> None:
    def extend(groups: Groups) -> None:
        groups["ema_diffusion"] = {key: tensor + 1 for key, tensor in groups["action_model"].items()}
        groups["llm_backbone"]["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        groups["llm_backbone"]["llm.model.rotary_emb.inv_freq"] = torch.ones(8)

    assert_same_parameters(load(rewrite(run, stored, extend)), stored)


def test_tensors_that_inference_never_reads_may_be_gone(run: Path, stored: Groups) -> None:
    unused = ("llm.lm_head.", "net.history_embedder.", "siglip_featurizer.attn_pool.", "siglip_featurizer.norm.bias")
    last_blocks = ("dino_featurizer.blocks.2.mlp.", "siglip_featurizer.blocks.3.attn.")

    def strip(groups: Groups) -> None:
        for tensors in groups.values():
            for key in [key for key in tensors if key.startswith((*unused, *last_blocks))]:
                del tensors[key]

    assert_same_parameters(load(rewrite(run, stored, strip)), stored)


def inputs(policy: CogACT, case: dict[str, Any], frame: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
    ids = case["input_ids"]
    padded = torch.tensor([ids + [32000] * (TEXT_TOKENS - len(ids))])
    return torch.from_numpy(policy.processor.image(frame))[None], padded, torch.tensor([len(ids)])


def test_visual_features_equal_the_reference(policy: CogACT, golden_dir: Path, frame: Image.Image) -> None:
    reference = np.load(golden_dir / "case0.npz")
    with torch.no_grad():
        patches = policy.vision_backbone(torch.from_numpy(policy.processor.image(frame))[None])
        projected = policy.projector(patches)
    assert relative_deviation(patches, reference["vision_patches"]) < 1e-5
    assert relative_deviation(projected, reference["projected"]) < 1e-5


@pytest.mark.parametrize("number", [0, 1, 2])
def test_cognition_and_samples_equal_the_reference(
    policy: CogACT, golden: dict[str, Any], golden_dir: Path, frame: Image.Image, number: int
) -> None:
    case, reference = golden["cases"][number], np.load(golden_dir / f"case{number}.npz")
    image, input_ids, text_length = inputs(policy, case, frame)
    with torch.no_grad():
        cognition = policy.cognition(image, input_ids, text_length)
    samples = policy.sample(
        image,
        input_ids,
        text_length,
        torch.from_numpy(reference["noise"]),
        ddim_steps=case["num_ddim_steps"],
        cfg_scale=case["cfg_scale"],
    )
    assert relative_deviation(cognition[:, 0], reference["cognition"]) < 1e-5
    assert relative_deviation(samples, reference["samples"]) < 1e-4


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_denoising_step_equals_the_reference(
    policy: CogACT, golden: dict[str, Any], golden_dir: Path, number: int
) -> None:
    case, reference = golden["cases"][number], np.load(golden_dir / f"case{number}.npz")
    condition = torch.from_numpy(reference["cognition"])[:, None]
    # The reference carries the conditional and the unconditional half of a batch, which are equal; ours carries one.
    x, *expected = torch.from_numpy(reference["trajectory"][:, :1])
    for step, following in zip(ddim_schedule(case["num_ddim_steps"]), expected, strict=True):
        timestep = torch.tensor([float(step.timestep)])
        with torch.no_grad():
            x = step.sample * x + step.noise * policy.action_model(x, timestep, condition, case["cfg_scale"])
        assert relative_deviation(x, following.numpy()) < 1e-4


def test_missing_unexpected_and_misshapen_tensors_are_all_named_with_their_group(run: Path, stored: Groups) -> None:
    def damage(groups: Groups) -> None:
        del groups["llm_backbone"]["llm.model.layers.3.mlp.up_proj.weight"]
        del groups["vision_backbone"]["dino_featurizer.blocks.1.ls2.gamma"]
        groups["projector"]["projector.9.scale"] = torch.ones(1)
        groups["action_model"]["net.z_embedder.uncondition"] = torch.ones(1, 4096)

    with pytest.raises(CheckpointError) as caught:
        load(rewrite(run, stored, damage))
    message = str(caught.value)
    assert message.startswith(f"{checkpoint_file(run)}: ")
    assert "2 missing keys: " in message
    assert "llm_backbone.llm.model.layers.3.mlp.up_proj.weight" in message
    assert "vision_backbone.dino_featurizer.blocks.1.ls2.gamma" in message
    assert "1 unexpected keys: projector.projector.9.scale; " in message
    assert "1 wrong shapes: action_model.net.z_embedder.uncondition (expected [1, 64], found [1, 4096])" in message


@pytest.mark.parametrize(
    ("group", "key"),
    [
        ("llm_backbone", "llm.model.extra.weight"),
        ("vision_backbone", "dino_featurizer.blocks.0.attn.q_norm.weight"),
        ("vision_backbone", "dino_featurizer.normal"),
        ("action_model", "net.blocks.0.norm1.weight"),
    ],
)
def test_an_unexpected_tensor_is_named_with_its_group(run: Path, stored: Groups, group: str, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"1 unexpected keys: {group}\.{key}; "):
        load(rewrite(run, stored, lambda groups: groups[group].update({key: torch.ones(1)})))


def test_a_long_list_of_keys_is_capped(run: Path, stored: Groups) -> None:
    extra = {f"extra.{i:02}": torch.ones(1) for i in range(25)}
    with pytest.raises(CheckpointError, match=r"25 unexpected keys: .*extra\.19 and 5 more") as caught:
        load(rewrite(run, stored, lambda groups: groups["projector"].update(extra)))
    assert "extra.20" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.ones(320, 80, dtype=torch.int8), r"torch\.int8, torch\.strided, cpu"),
        (torch.ones(320, 80).to_sparse(), r"torch\.float32, torch\.sparse_coo, cpu"),
        (torch.ones(320, 80, device="meta"), r"torch\.float32, torch\.strided, meta"),
    ],
)
@pytest.mark.parametrize("deferred", [False, True])
def test_a_tensor_that_is_not_dense_floating_point_with_values_is_refused(
    run: Path, stored: Groups, tensor: Tensor, found: str, deferred: bool
) -> None:
    with pytest.raises(CheckpointError, match=rf"1 wrong types: projector\.projector\.0\.weight .*found {found}\)"):
        load(
            rewrite(run, stored, lambda groups: groups["projector"].update({"projector.0.weight": tensor})),
            deferred=deferred,
        )


def test_parts_of_different_models_are_refused_by_the_file_name(run: Path, stored: Groups) -> None:
    def widen(groups: Groups) -> None:
        groups["projector"]["projector.0.weight"] = torch.ones(320, 81)

    with pytest.raises(CheckpointError, match=r"\.pt: input width of the projector .*expected 80, found 81"):
        load(rewrite(run, stored, widen))


@pytest.mark.parametrize("group", ["vision_backbone", "action_model"])
def test_a_file_without_the_groups_of_cogact_is_called_openvla(run: Path, stored: Groups, group: str) -> None:
    with pytest.raises(CheckpointError, match=rf"without {group} it is an OpenVLA or Prismatic file") as caught:
        load(rewrite(run, stored, lambda groups: groups.__delitem__(group)))
    assert "expected the groups vision_backbone, projector, llm_backbone, action_model" in str(caught.value)


def test_wrong_group_names_are_listed_beside_the_expected_ones(run: Path, stored: Groups) -> None:
    def rename(groups: Groups) -> None:
        groups["language_model"] = groups.pop("llm_backbone")

    with pytest.raises(CheckpointError, match=r"expected the groups .*llm_backbone.*found .*language_model") as caught:
        load(rewrite(run, stored, rename))
    assert "OpenVLA" not in str(caught.value)


def test_a_group_of_unknown_meaning_is_refused(run: Path, stored: Groups) -> None:
    with pytest.raises(CheckpointError, match=r"expected the groups .*found .*action_model, proprio_encoder$"):
        load(rewrite(run, stored, lambda groups: groups.update({"proprio_encoder": {}})))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1], "expected .*, found list"),
        ({"state_dict": {}, "epoch": 3}, "expected .*, found state_dict, epoch"),
        ({"model": [1]}, "expected .*, found model"),
        (
            {"model": {"vision_backbone": 1, "projector": {}, "llm_backbone": {}, "action_model": {}}},
            "group 'vision_backbone': expected tensors by key, found int",
        ),
        (
            {"model": {"vision_backbone": {"a": 1}, "projector": {}, "llm_backbone": {}, "action_model": {}}},
            r"vision_backbone\.a: expected a tensor, found int",
        ),
    ],
)
def test_another_structure_is_refused(run: Path, contents: object, message: str) -> None:
    save(run, contents)
    with pytest.raises(CheckpointError, match=message):
        load(run)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        (b"<html>", "expected a checkpoint written by torch.save; copy or download it again"),
        (b"PK\x03\x04 no archive", "truncated or damaged"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(run: Path, contents: bytes, message: str) -> None:
    replace(checkpoint_file(run), contents)
    with pytest.raises(CheckpointError, match=message):
        load(run)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9999])
def test_a_truncated_checkpoint_is_refused(run: Path, share: float) -> None:
    whole = checkpoint_file(run).read_bytes()
    replace(checkpoint_file(run), whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"truncated or damaged .*copy or download it again"):
        load(run)


def test_the_format_of_old_torch_is_to_be_saved_anew(run: Path) -> None:
    file = checkpoint_file(run)
    file.unlink()
    torch.save({"model": {}}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format of before 2020; re-save it"):
        load(run)


def test_a_checkpoint_that_could_run_code_is_refused(run: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    save(run, {"model": Payload()})
    with pytest.raises(CheckpointError, match="refused since they could run code"):
        load(run)
    assert not (tmp_path / "ran").exists()


def narrow_statistics(width: int) -> dict[str, object]:
    return {"action": {"q01": [-1.0] * width, "q99": [1.0] * width, "mask": [True] * width}}


def test_a_dataset_with_other_actions_is_left_out_and_reported(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    datasets = {"bridge": narrow_statistics(7), "aloha": narrow_statistics(14)}
    replace(run / "dataset_statistics.json", json.dumps(datasets).encode())
    with caplog.at_level(logging.WARNING):
        assert list(load(run).processor.statistics) == ["bridge"]
    assert "'aloha' has 14" in caplog.text


def test_statistics_of_no_dataset_with_the_policys_actions_are_refused(run: Path) -> None:
    replace(run / "dataset_statistics.json", json.dumps({"aloha": narrow_statistics(14)}).encode())
    with pytest.raises(CheckpointError, match=r"dataset_statistics\.json: .*7 numbers, found none: 'aloha' has 14"):
        load(run)


def test_an_action_head_of_another_width_is_refused_as_such_and_not_by_its_statistics(
    run: Path, stored: Groups
) -> None:
    def widen(groups: Groups) -> None:
        head = groups["action_model"]
        for name in ("x_embedder", "history_embedder"):
            head[f"net.{name}.linear.weight"] = torch.ones(48, 14)
        head["net.final_layer.linear.weight"] = torch.ones(14, 48)
        head["net.final_layer.linear.bias"] = torch.ones(14)

    rewrite(run, stored, widen)
    replace(run / "dataset_statistics.json", json.dumps({"aloha": narrow_statistics(14)}).encode())
    with pytest.raises(UnsupportedModelError, match=r"\.pt: an action has 14 numbers .*expected 7"):
        load(run)


def test_the_moving_average_of_the_head_is_loaded_where_it_is_asked_for(run: Path, stored: Groups) -> None:
    def extend(groups: Groups) -> None:
        groups["ema_diffusion"] = {key: tensor + 1 for key, tensor in groups["action_model"].items()}

    rewrite(run, stored, extend)
    name = "net.final_layer.linear.bias"
    for use_ema, expected in ((False, stored["action_model"][name]), (True, stored["action_model"][name] + 1)):
        assert torch.equal(load(run, use_ema=use_ema).get_parameter(f"action_model.{name}"), expected)


def set_base_model(run: Path, vla: object) -> None:
    contents = json.loads((run / "config.json").read_text(encoding="utf-8"))
    replace(run / "config.json", json.dumps(contents | {"vla": vla}).encode())


@pytest.mark.parametrize(
    "base",
    [
        "prism-dinosiglip-224px+7b",
        "prism-dinosiglip-224px-controlled+7b",
        "/data/vlms/prism-dinosiglip-224px+7b",
        "/data/prism-dinosiglip-224px+7b/checkpoints/latest-checkpoint.pt",
    ],
)
def test_a_base_model_with_the_same_prompt_and_resize_is_taken(run: Path, base: str) -> None:
    set_base_model(run, {"base_vlm": base})
    load(run)


@pytest.mark.parametrize(
    "base", ["prism-dinosiglip+7b", "siglip-224px+7b", "prism-qwen25-extra-dinosiglip-224px+0_5b", "llava-lrv+7b", ""]
)
def test_a_base_model_of_unknown_prompt_and_resize_is_refused(run: Path, base: str) -> None:
    set_base_model(run, {"base_vlm": base})
    with pytest.raises(UnsupportedModelError, match=r"config\.json: vla\.base_vlm is .*prompt and resize") as caught:
        load(run)
    assert repr(base) in str(caught.value)


@pytest.mark.parametrize("vla", [[], {"base_vlm": 7}, "prism-dinosiglip-224px+7b"])
def test_a_base_model_that_is_no_name_is_refused(run: Path, vla: object) -> None:
    set_base_model(run, vla)
    with pytest.raises(CheckpointError, match=r'config\.json: expected "vla" to be an object'):
        load(run)


@pytest.mark.parametrize("name", ["config.json", "dataset_statistics.json"])
def test_a_missing_file_of_the_run_directory_is_named_where_it_was_expected(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{run / name}: expected this file"):
        load(run)


@pytest.mark.parametrize("name", ["config.json", "dataset_statistics.json"])
def test_a_malformed_file_of_the_run_directory_is_named(run: Path, name: str) -> None:
    replace(run / name, b"{")
    with pytest.raises(CheckpointError, match=rf"{run / name}: expected a JSON object"):
        load(run)


@pytest.mark.parametrize("settings", [[], {"head": {}}, {"heads": [3]}])
def test_malformed_settings_in_the_config_are_refused(run: Path, settings: object) -> None:
    replace(run / "config.json", json.dumps({"evla_compile": settings}).encode())
    with pytest.raises(CheckpointError, match=r'config\.json: expected "evla_compile" to be an object like'):
        load(run)


def test_unpublished_sizes_without_head_counts_say_what_to_add(run: Path) -> None:
    replace(run / "config.json", b'{"vla": {}}')
    with pytest.raises(UnsupportedModelError, match=r"dino: .*width 48.*to config\.json"):
        load(run)


def test_statistics_of_another_form_are_refused_by_the_file_name(run: Path) -> None:
    replace(run / "dataset_statistics.json", b'{"bridge_orig": {"action": {"q01": [0]}}}')
    with pytest.raises(CheckpointError, match=r"dataset_statistics\.json: .*bridge_orig"):
        load(run)


def test_the_tokenizer_argument_wins_over_the_run_directory(run: Path, tokenizer_json: str) -> None:
    given = run.parent / "other.json"
    given.write_text(tokenizer_json.replace('"version"', ' "version"', 1), encoding="utf-8")
    assert load(run, tokenizer=given).processor.tokenizer_json == given.read_text(encoding="utf-8") != tokenizer_json
    assert load(run).processor.tokenizer_json == tokenizer_json


@pytest.mark.parametrize("contents", [b"{", b"{}"])
def test_an_unreadable_tokenizer_is_refused_by_its_file_name(run: Path, contents: bytes) -> None:
    replace(run / "tokenizer.json", contents)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*cannot be parsed"):
        load(run)


def shrink_vocabulary(rows: int) -> Edit:
    def shrink(groups: Groups) -> None:
        key = "llm.model.embed_tokens.weight"
        groups["llm_backbone"][key] = groups["llm_backbone"][key][:rows].clone()

    return shrink


def test_the_padding_id_is_cogacts_row_behind_the_vocabulary(policy: CogACT) -> None:
    assert policy.processor.pad_id == 32000


def test_an_embedding_without_that_row_needs_a_padding_id(run: Path, stored: Groups) -> None:
    rewrite(run, stored, shrink_vocabulary(32000))
    with pytest.raises(UnsupportedModelError, match=r'32000 rows.*add \{"evla_compile": \{"pad_id": N\}\}'):
        load(run)
    configure(run, pad_id=0)
    assert load(run).processor.pad_id == 0


@pytest.mark.parametrize("pad_id", [-1, 32064, "0", True, 1.0])
def test_a_padding_id_outside_the_embedding_is_refused(run: Path, pad_id: object) -> None:
    configure(run, pad_id=pad_id)
    with pytest.raises(
        CheckpointError, match=r"evla_compile\.pad_id = .*: expected a row of the embedding, 0 to 32063"
    ):
        load(run)


def small_tokenizer(**vocabulary: int) -> bytes:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **vocabulary}, "<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str()).encode()


def test_a_tokenizer_with_more_pieces_than_the_embedding_has_rows_is_refused(run: Path, stored: Groups) -> None:
    rewrite(run, stored, shrink_vocabulary(512))
    configure(run, pad_id=0)
    with pytest.raises(CheckpointError, match=r"tokenizer has 32000 pieces.*the embedding has 512 rows"):
        load(run)


def test_a_policy_with_a_tokenizer_of_its_own_is_loaded(run: Path, stored: Groups) -> None:
    rewrite(run, stored, shrink_vocabulary(5))
    configure(run, pad_id=0)
    replace(run / "tokenizer.json", small_tokenizer(**{"\u2581": 3, "lift": 4}))
    assert load(run).processor.prompt_ids("lift")[-2:] == [3, 2]
    replace(run / "tokenizer.json", small_tokenizer(lift=3))
    with pytest.raises(CheckpointError, match=r"gives '\u2581' the id 29871, but the embedding has 5 rows"):
        load(run)
    replace(run / "tokenizer.json", small_tokenizer(**{"\u2581": 3, "lift": 9}))
    with pytest.raises(CheckpointError, match=r"5 pieces, ids up to 9, .*but the embedding has 5 rows"):
        load(run)


def test_a_foreign_tokenizer_beside_llama_2s_embedding_is_refused(run: Path) -> None:
    replace(run / "tokenizer.json", small_tokenizer(**{"\u2581": 28705}))
    with pytest.raises(CheckpointError, match=r"id 28705, not 29871.*Llama-2's tokenizer.json"):
        load(run)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_another_dtype_is_refused(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\..*: expected torch\.float32 or torch\.bfloat16"):
        load(tiny_checkpoint, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_an_unusable_device_is_refused(tiny_checkpoint: Path, device: str) -> None:
    with pytest.raises(ValueError, match=rf"device='{device}': "):
        load(tiny_checkpoint, device=device)

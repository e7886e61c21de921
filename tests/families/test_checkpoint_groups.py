"""What a checkpoint's groups are taken for: which action head, and wrappers around key names."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from evla_compile.errors import CheckpointError
from evla_compile.families.cogact.loading.checkpoint_groups import read_groups

Groups = dict[str, dict[str, Tensor]]


@pytest.fixture
def groups() -> Groups:
    return {
        group: {"a.weight": torch.full((2,), float(number)), "b.bias": torch.zeros(1)}
        for number, group in enumerate(("vision_backbone", "projector", "llm_backbone", "action_model"))
    }


def with_ema(groups: Groups) -> Groups:
    return groups | {"ema_diffusion": {"a.weight": torch.full((2,), 9.0), "b.bias": torch.ones(1)}}


def head(tensors: dict[str, Tensor]) -> float:
    return float(tensors["action_model.a.weight"][0])


def test_with_both_heads_the_moving_average_is_read_only_where_it_is_asked_for(groups: Groups) -> None:
    contents = {"model": with_ema(groups)}
    assert [head(read_groups(contents, use_ema=use_ema)) for use_ema in (False, True, None)] == [3.0, 9.0, 3.0]
    assert not any(name.startswith("ema_diffusion") for name in read_groups(contents, use_ema=True))


def test_a_file_with_the_moving_average_alone_says_how_to_read_it(groups: Groups) -> None:
    contents = {"model": with_ema(groups)}
    del contents["model"]["action_model"]
    with pytest.raises(CheckpointError, match=r"ema_diffusion.* alone.*use_ema=True.*--use-ema") as caught:
        read_groups(contents)
    assert "OpenVLA" not in str(caught.value)
    assert [head(read_groups(contents, use_ema=use_ema)) for use_ema in (True, None)] == [9.0, 9.0]


def test_a_moving_average_that_is_not_there_is_not_replaced_by_the_other_head(groups: Groups) -> None:
    with pytest.raises(CheckpointError, match=r"use_ema=True: .*no group ema_diffusion"):
        read_groups({"model": groups}, use_ema=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod."])
def test_a_prefix_that_all_keys_share_is_left_out_and_reported(
    groups: Groups, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read_groups({"model": groups})
    groups["action_model"] = {prefix + key: tensor for key, tensor in groups["action_model"].items()}
    wrapped = {prefix + group: tensors for group, tensors in groups.items()}
    for contents in ({"model": groups}, {"model": wrapped}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = read_groups(contents)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert f"'{prefix}'" in caplog.text
        assert "action_model" in caplog.text


def test_keys_without_a_wrapper_report_nothing(groups: Groups, caplog: pytest.LogCaptureFixture) -> None:
    read_groups({"model": groups})
    assert not caplog.records


@pytest.mark.parametrize("key", ["module.c.weight", "c._orig_mod.weight", "c._fsdp_wrapped_module.d.weight"])
def test_a_wrapper_in_some_keys_is_refused_with_a_remedy(groups: Groups, key: str) -> None:
    groups["projector"][key] = torch.zeros(1)
    wrapper = next(part for part in key.split(".") if "mod" in part)
    with pytest.raises(CheckpointError, match=rf"projector: 1 of 3 keys hold '{wrapper}\.', such as {key}.*state_dict"):
        read_groups({"model": groups})


@pytest.mark.parametrize("contents", [{"model": {1: {}}}, {"model": {"vision_backbone": {1: torch.zeros(1)}}}])
def test_names_that_are_no_text_are_refused(contents: Any) -> None:
    with pytest.raises(CheckpointError):
        read_groups(contents)

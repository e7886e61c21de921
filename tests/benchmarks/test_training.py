"""The demo policy's training: what it is fed, that it learns, resumes exactly, and writes what `load` reads."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.closed_loop.simulation.tasks import TASKS
from benchmarks.closed_loop.training import train
from benchmarks.closed_loop.training.episodes import CHUNK, Episode, load_demonstrations
from benchmarks.closed_loop.training.policy import TrainingPolicy, _drop_patches, demo_sizes
from benchmarks.closed_loop.training.run_directory import action_statistics
from benchmarks.closed_loop.training.tokenizer import PAD_ID, VOCABULARY, make_tokenizer
from evla_compile.demo.shipped_policy import DEMO_POLICY
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.host.processor import Processor


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes a task of noise, in the form that collect.py writes."""
    folder = tmp_path_factory.mktemp("demonstrations")
    generator = np.random.Generator(np.random.PCG64(5))
    for task in TASKS:
        (folder / task).mkdir()
        for seed in range(2):
            actions = 0.01 * generator.uniform(-1.0, 1.0, (4 + CHUNK, 7))
            actions[:, 3:6], actions[:, 6] = 0.0, np.arange(4 + CHUNK) % 2
            episode = Episode(
                frames=generator.integers(0, 256, (2, 112, 112, 3), dtype=np.uint8),
                steps=np.array([0, 3]),
                actions=actions.astype(np.float32),
                states=generator.standard_normal((2, 9)).astype(np.float32),
            )
            episode.save(folder / task / f"{seed:05}.npz")
    return folder


def run(demonstrations: Path, folder: Path, until: int) -> list[float]:
    """Train up to a step and return the losses logged so far."""
    asked = ["--steps", "4", "--until", str(until), "--batch", "2", "--draws", "2", "--log-every", "1"]
    train.main([str(demonstrations), str(folder), *asked])
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoint(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    (file,) = (folder / "run" / "checkpoints").glob("*.pt")
    stored: dict[str, dict[str, torch.Tensor]] = torch.load(file, weights_only=True)["model"]
    return stored


def test_a_resumed_training_equals_an_uninterrupted_one(demonstrations: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    losses = run(demonstrations, whole, 4)
    run(demonstrations, halves, 2)
    assert run(demonstrations, halves, 4) == losses
    assert len(losses) == 4
    one, two = checkpoint(whole), checkpoint(halves)
    assert all(torch.equal(tensor, two[group][key]) for group, keys in one.items() for key, tensor in keys.items())
    policy = load(whole / "run")
    assert policy.sizes == demo_sizes(VOCABULARY, CHUNK)
    assert policy.predict_action(np.zeros((64, 64, 3), dtype=np.uint8), "open the door").shape == (16, 7)


def test_training_learns_one_episode_by_heart(demonstrations: Path) -> None:
    data = load_demonstrations(demonstrations, limit=1)
    processor = Processor(
        tokenizer_json=make_tokenizer(),
        statistics={"metaworld": action_statistics(data.actions)},
        image_side=112,
        pad_id=PAD_ID,
    )
    torch.manual_seed(0)
    policy = TrainingPolicy(demo_sizes(VOCABULARY, CHUNK), processor, draws=8)
    prepared = train._prepare(data, processor)
    batch = prepared.batch(np.random.Generator(np.random.PCG64(1)), 4, torch.device("cpu"), list(TASKS))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    losses = []
    for step in range(12):
        loss, auxiliary = policy(*batch, step)
        optimizer.zero_grad()
        (loss + auxiliary).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, abs=0.15)  # a final layer of zeros predicts no noise at all
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_regularisers_skip_layers_and_patches_and_nothing_else() -> None:
    processor = Processor(tokenizer_json=make_tokenizer(), statistics={}, image_side=112, pad_id=PAD_ID)
    sizes = demo_sizes(VOCABULARY, CHUNK)
    sizes = replace(sizes, language=replace(sizes.language, layers=4))
    policy = TrainingPolicy(sizes, processor, draws=1, patch_drop=1e-12).policy
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (2, 112, 112, 3), dtype=torch.uint8, generator=generator)
    inputs = (image, torch.randint(3, VOCABULARY, (2, 20), generator=generator), torch.tensor([15, 20]))

    def cognition(layer_drop: float, patch_drop: float) -> Tensor:
        trained = TrainingPolicy(sizes, processor, draws=1, layer_drop=layer_drop, patch_drop=patch_drop)
        trained.policy.load_state_dict(policy.state_dict())
        with torch.no_grad():
            return trained._cognition(*inputs, torch.Generator().manual_seed(0))

    with torch.no_grad():
        dense = policy.cognition(*inputs)
        assert torch.equal(cognition(0.0, 1e-12), dense)
        policy.llm_backbone.llm.model.layers = policy.llm_backbone.llm.model.layers[:2]
        shallow = policy.cognition(*inputs)
        policy.llm_backbone.llm.model.layers.extend(
            TrainingPolicy(sizes, processor, draws=1).policy.llm_backbone.llm.model.layers[2:]
        )
    assert torch.equal(cognition(1.0, 0.0), shallow)
    assert not torch.allclose(cognition(0.0, 1.0), dense)


def test_dropped_patches_leave_text_and_positions_as_they_were() -> None:
    hidden = torch.arange(2 * 12 * 3, dtype=torch.float32).reshape(2, 12, 3)
    table = torch.arange(12.0)[None, :, None]
    kept, (cosines, sines) = _drop_patches(hidden, (table, table + 100), 9, torch.Generator().manual_seed(1))
    assert torch.equal(kept[:, :1], hidden[:, :1])
    assert torch.equal(kept[:, -2:], hidden[:, -2:])
    assert 3 + 2 <= kept.shape[1] < 12
    for row in range(2):
        positions = cosines[row, :, 0].long()
        assert torch.equal(kept[row], hidden[row, positions])
        assert torch.equal(sines[row, :, 0], positions + 100.0)
        assert (positions.diff() > 0).all()


def test_chunks_follow_their_frames(demonstrations: Path) -> None:
    data = load_demonstrations(demonstrations)
    episode = Episode.load(demonstrations / "reach" / "00000.npz")
    np.testing.assert_array_equal(data.chunks[0], episode.actions[:16])
    np.testing.assert_array_equal(data.chunks[1], episode.actions[3:19])
    assert data.frames.shape == (20, 112, 112, 3)
    assert {task: rows.tolist() for task, rows in data.rows.items()}["door-open"] == [8, 9, 10, 11]
    assert set(data.episodes.values()) == {2}


def test_missing_demonstrations_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"reach: no episodes; run python -m benchmarks\..*\.collect"):
        load_demonstrations(tmp_path)


def test_the_processor_undoes_the_normalisation(demonstrations: Path) -> None:
    data = load_demonstrations(demonstrations)
    statistics = action_statistics(data.actions)
    assert statistics.mask == (True,) * 6 + (False,)
    processor = Processor(
        tokenizer_json=make_tokenizer(), statistics={"metaworld": statistics}, image_side=112, pad_id=PAD_ID
    )
    normalised = train._prepare(data, processor).chunks
    expected: NDArray[np.float64] = np.clip(data.chunks, statistics.low, statistics.high)
    np.testing.assert_allclose(processor.actions(normalised), expected, atol=1e-8)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [train.learning_rate(step, 4000, 1.0, 0.25) for step in range(4000)]
    assert rates[0] == pytest.approx(1 / train.WARM_UP_STEPS)
    assert rates[train.WARM_UP_STEPS : 3000] == [1.0] * (3000 - train.WARM_UP_STEPS)
    assert rates[3500] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01
    assert [train.learning_rate(step, 2000, 1.0, 0.0) for step in range(2000)] == rates[:2000]


def test_a_task_named_twice_is_drawn_twice_as_often(demonstrations: Path) -> None:
    data = load_demonstrations(demonstrations, ["window-open", "reach"])
    assert list(data.rows) == ["reach", "window-open"]
    assert len(data.frames) == sum(map(len, data.rows.values()))
    prepared = train.TrainingData(
        demonstrations=data,
        chunks=data.chunks,
        states=data.states,
        prompts={task: [(np.array([index]), 1)] for index, task in enumerate(TASKS)},
    )
    drawn = prepared.batch(
        np.random.Generator(np.random.PCG64(0)), 3000, torch.device("cpu"), ["reach", "reach", "window-open"]
    )[1]
    assert (drawn == 0).sum() == pytest.approx(2000, abs=100)
    assert (drawn == list(TASKS).index("window-open")).sum() == pytest.approx(1000, abs=100)


def test_the_tokenizer_keeps_llama_2s_conventions() -> None:
    text = make_tokenizer()
    assert text == make_tokenizer()
    assert text.rstrip("\n") == (DEMO_POLICY / "tokenizer.json").read_text(encoding="utf-8").rstrip("\n")
    processor = Processor(tokenizer_json=text, statistics={}, image_side=112, pad_id=PAD_ID)
    prompts = {i: processor.prompt_ids(i) for task in TASKS.values() for i in task.instructions}
    assert all(len(ids) <= train.TEXT_TOKENS and 0 not in ids for ids in prompts.values())
    assert all(ids[0] == 1 and ids[-2:] == [processor.blank_id, 2] for ids in prompts.values())
    assert len(set(map(tuple, prompts.values()))) == len(prompts)
    assert processor.vocabulary <= VOCABULARY
    assert 0 not in processor.prompt_ids("Juggle 7 quick, vexed wombats & fly (bzw. jump)!")

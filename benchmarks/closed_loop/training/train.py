"""Train a policy of CogACT's architecture on demonstrations, by behaviour cloning with CogACT's diffusion loss.

    python -m benchmarks.closed_loop.training.train DEMONSTRATIONS FOLDER --steps 6000
    torchrun --nproc-per-node 2 -m benchmarks.closed_loop.training.train DEMONSTRATIONS FOLDER --steps 6000

FOLDER gets the state to resume from (the same command goes on where it stopped), log.jsonl, and `run`, an official run
directory with the moving average of the weights in half precision. Under torchrun every process takes its share of the
batch; on a CPU one thread each, which stays fast when other programs run beside it.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.closed_loop.simulation.tasks import TASKS
from benchmarks.closed_loop.training.episodes import CHUNK, Demonstrations, load_demonstrations
from benchmarks.closed_loop.training.policy import TrainingPolicy, demo_sizes
from benchmarks.closed_loop.training.run_directory import action_statistics, write_run
from benchmarks.closed_loop.training.tokenizer import PAD_ID, VOCABULARY, make_tokenizer
from evla_compile.host.processor import GRIPPER, Processor

TEXT_TOKENS = 28
"""Text budget of training; any that fits the prompts gives the same policy."""
WARM_UP_STEPS = 200
"""Steps over which the learning rate rises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """The processes that train together."""

    rank: int
    """Which of them this is."""
    size: int
    """How many they are."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingData:
    """Demonstrations in the form in which the policy takes them."""

    demonstrations: Demonstrations
    """Frames, and which belong to each task."""
    chunks: NDArray[np.float32]
    """Normalised action chunks [M,A,7]."""
    states: NDArray[np.float32]
    """Positions [M,9], shifted and scaled to mean 0 and deviation 1."""
    prompts: dict[str, list[tuple[NDArray[np.int64], int]]]
    """Padded token ids [T] and their number, for every instruction of each task."""

    def batch(
        self, generator: np.random.Generator, size: int, device: torch.device, among: Sequence[str]
    ) -> list[Tensor]:
        """Return image, ids, text length, chunk and state of a batch; every name in `among` is equally likely."""
        tasks = generator.choice(list(among), size)
        rows = np.array([generator.choice(self.demonstrations.rows[task]) for task in tasks])
        texts = [self.prompts[task][generator.integers(len(self.prompts[task]))] for task in tasks]
        arrays: list[NDArray[Any]] = [
            self.demonstrations.frames[rows],
            np.stack([ids for ids, _ in texts]),
            np.array([length for _, length in texts]),
            self.chunks[rows],
            self.states[rows],
        ]
        return [torch.from_numpy(array).to(device) for array in arrays]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or continue training."""
    given = _parser().parse_args(arguments)
    team = Team(rank=int(os.environ.get("RANK", "0")), size=int(os.environ.get("WORLD_SIZE", "1")))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if given.device == "cuda" else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(given.threads)
    if team.size > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    console = Console(quiet=team.rank > 0, soft_wrap=True)
    with console.status("reading the demonstrations"):
        demonstrations = load_demonstrations(given.demonstrations, given.tasks)
    side = demonstrations.frames.shape[1]
    statistics = action_statistics(demonstrations.actions)
    processor = Processor(
        tokenizer_json=make_tokenizer(), statistics={"metaworld": statistics}, image_side=side, pad_id=PAD_ID
    )
    data = _prepare(demonstrations, processor)
    console.print(f"{len(data.chunks)} frames of {dict(demonstrations.episodes)} episodes, {side} px")
    torch.manual_seed(given.seed)
    policy = TrainingPolicy(
        demo_sizes(VOCABULARY, CHUNK),
        processor,
        draws=given.draws,
        layer_drop=given.layer_drop,
        patch_drop=given.patch_drop,
    ).to(device)
    parameters = sum(parameter.numel() for parameter in policy.policy.parameters())
    console.print(f"{parameters / 1e6:.1f} M parameters, {team.size} processes, batch {team.size * given.batch}")
    given.folder.mkdir(parents=True, exist_ok=True)
    _train(policy, data, given, team, device, console)
    if team.size > 1:
        distributed.destroy_process_group()


def learning_rate(step: int, steps: int, peak: float, decay_share: float) -> float:
    """Return the learning rate of a step from 0 up: a rise, a plateau that more steps can prolong, a linear fall."""
    falling = max(1, round(decay_share * steps))
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / falling)


def _train(
    policy: TrainingPolicy,
    data: TrainingData,
    given: argparse.Namespace,
    team: Team,
    device: torch.device,
    console: Console,
) -> None:
    weights = dict(policy.named_parameters())
    average = {name: tensor.detach().clone() for name, tensor in weights.items()}
    decayed = [tensor for tensor in weights.values() if tensor.ndim == 2]
    others = [tensor for tensor in weights.values() if tensor.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": given.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=given.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    state_file = given.folder / "state.pt"
    start = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True, mmap=True)
        policy.load_state_dict(state["weights"])
        for name, tensor in state["average"].items():
            average[name].copy_(tensor)
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        console.print(f"going on from step {start}")
    # skipped layers have no gradients
    model = DistributedDataParallel(policy, find_unused_parameters=given.layer_drop > 0) if team.size > 1 else policy
    since, began = start, perf_counter()
    until = given.steps if given.until is None else min(given.until, given.steps)
    for step in _progress(range(start, until), console):
        rate = learning_rate(step, given.steps, given.learning_rate, given.decay_share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # a step's batch depends on its number alone, so that a resumed training sees the same
        generator = np.random.Generator(np.random.PCG64([given.seed, step, team.rank]))
        batch = data.batch(generator, given.batch, device, given.tasks)
        loss, auxiliary = model(*batch, int(generator.integers(1 << 62)))
        optimizer.zero_grad()
        (loss + given.auxiliary * auxiliary).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        decay = min(given.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(weights.values()), 1.0 - decay)
        done = step + 1
        if team.rank == 0 and (done % given.log_every == 0 or done == until):
            speed = team.size * given.batch * (done - since) / (perf_counter() - began)
            since, began = done, perf_counter()
            entry = {"step": done, "loss": loss.item(), "auxiliary": auxiliary.item(), "gradient_norm": norm.item(),
                     "learning_rate": rate, "samples_per_second": round(speed, 2)}  # fmt: skip
            with (given.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
        if team.rank == 0 and (done % given.save_every == 0 or done == until):
            _save(state_file, {"step": done, "weights": policy.state_dict(), "average": average,
                               "optimizer": optimizer.state_dict()})  # fmt: skip
            kept = {name.removeprefix("policy."): tensor for name, tensor in average.items()}
            write_run(given.folder / "run", policy.policy.sizes, policy.policy.processor, kept, done)


def _prepare(demonstrations: Demonstrations, processor: Processor) -> TrainingData:
    statistics = processor.statistics_for(None)
    low, high = np.array(statistics.low), np.array(statistics.high)
    span = np.where(high > low, high - low, 1.0)
    normalised = np.where(high > low, 2.0 * (demonstrations.chunks - low) / span - 1.0, 0.0).clip(-1.0, 1.0)
    chunks = normalised.astype(np.float32)
    chunks[..., GRIPPER] = demonstrations.chunks[..., GRIPPER]
    states = demonstrations.states
    return TrainingData(
        demonstrations=demonstrations,
        chunks=chunks,
        states=((states - states.mean(axis=0)) / (states.std(axis=0) + 1e-3)).astype(np.float32),
        prompts={
            name: [processor.text(instruction, TEXT_TOKENS) for instruction in task.instructions]
            for name, task in TASKS.items()
        },
    )


def _progress(steps: range, console: Console) -> Iterator[int]:
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield from progress.track(steps)


def _save(file: Path, state: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("demonstrations", type=Path, help="the folder that collect.py filled")
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument("--steps", type=int, default=6000, help="optimiser steps")
    parser.add_argument("--until", type=int, help="stop behind this step, for another run to go on (default: --steps)")
    parser.add_argument("--batch", type=int, default=16, help="frames of a step in each process")
    parser.add_argument("--draws", type=int, default=8, help="noise draws per frame (repeated diffusion steps)")
    parser.add_argument("--learning-rate", type=float, default=6e-4, help="its plateau")
    parser.add_argument(
        "--decay-share",
        type=float,
        default=0.25,
        help="share of the steps, at the end, over which it falls to zero; 0 lets a longer run go on from this one",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="one named twice is drawn twice as often"
    )
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of matrices")
    parser.add_argument("--auxiliary", type=float, default=1.0, help="weight of the auxiliary loss")
    parser.add_argument("--layer-drop", type=float, default=0.0, help="share of steps that skip a decoder layer")
    parser.add_argument("--patch-drop", type=float, default=0.0, help="share of steps that drop visual tokens")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the moving average of the weights")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, batches and noise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process on a CPU")
    parser.add_argument("--log-every", type=int, default=10, help="steps between two lines of log.jsonl")
    parser.add_argument("--save-every", type=int, default=200, help="steps between two checkpoints")
    return parser


if __name__ == "__main__":
    main()

"""Time and memory of calibration with repair, at any size, with random weights.

    python -m benchmarks.calibration_cost --size demo --frames 200 --repair all
    python -m benchmarks.calibration_cost --make-run RUN --size base --dtype bfloat16
    python -m benchmarks.calibration_cost --run RUN --frames 8 --repair last --out benchmarks/results/calibration-base
    python -m benchmarks.calibration_cost --size base --device cuda --dtype bfloat16 --frames 200

Without --run the weights are made on the device. With it they are mapped, as those of a published checkpoint are.
Frames are noise, so only time and memory mean anything.
"""

import argparse
import json
import lzma
import shutil
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console

import evla_compile as evla
from benchmarks.conditions import command_line
from benchmarks.latency.rows import SIZES
from benchmarks.latency.torch_paths import make_policy
from evla_compile.calibration.calibrate import calibrate
from evla_compile.calibration.dense_measures import DenseRun
from evla_compile.calibration.forecast import Forecast, forecast
from evla_compile.calibration.streams import Shelf, batches_of
from evla_compile.demo.demo import describe_machine
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.frames import Frame
from evla_compile.host.processor import Processor
from evla_compile.memory import watching_memory
from evla_compile.settings.budgets.budget import decision_of
from evla_compile.settings.budgets.repair import REPAIR_SCOPES, RepairDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.units import bytes_text

DATA = Path(__file__).parents[1] / "tests" / "data"
EPISODE = 4
"""Frames of an episode."""


def main() -> None:
    """Measure, print, and write where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--make-run", type=Path, help="write a run directory with random weights, and stop")
    parser.add_argument("--run", type=Path, help="run directory, whose weights are mapped")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--repair", choices=REPAIR_SCOPES, default="last")
    parser.add_argument(
        "--rho", type=float, help="one strength of the penalty; all that calibration tries if not given"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="OUT.json, to which the measurement is added")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console, dtype = Console(stderr=True, soft_wrap=True), getattr(torch, given.dtype)
    if given.make_run is not None:
        write_run(given.make_run, make_policy(given.size, torch.device("cpu"), dtype, seed=0))
        return
    with TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer.json"
        tokenizer.write_bytes(lzma.decompress((DATA / "tokenizer.json.xz").read_bytes()))
        if given.run is not None:
            policy = evla.load(given.run, tokenizer=tokenizer, dtype=dtype)
        else:
            policy = make_policy(given.size, torch.device(given.device), dtype, seed=0)
            policy.processor = Processor(
                tokenizer_json=tokenizer.read_text(encoding="utf-8"),
                statistics={},
                image_side=policy.sizes.image_side,
                pad_id=0,
            )
    config = CompileConfig(
        repair=given.repair,
        repair_rho=given.rho if given.repair != "none" else None,
        repair_frames=2 if given.repair != "none" else 40,
    ).resolve(policy.sizes)
    found = measure(policy, config, given.frames)
    found["weights"] = "mapped" if given.run is not None else "made on the device"
    machine = describe_machine(given.threads)
    if given.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    document = {
        "measured": found,
        "machine": machine,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": command_line("benchmarks.calibration_cost"),
    }
    console.print_json(json.dumps(document))
    if given.out is not None:
        file = given.out.with_suffix(".json")
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        file.write_text(json.dumps([*earlier, document], indent=1) + "\n", encoding="utf-8")


def measure(policy: CogACT, config: CompileConfig, count: int) -> dict[str, Any]:
    """Calibrate on frames of noise, and return what it took, JSON-ready."""
    draw = np.random.Generator(np.random.PCG64(0))
    side = policy.sizes.image_side
    frames = [
        Frame(draw.integers(0, 256, (side, side, 3), dtype=np.uint8), "pick up the apple", str(number // EPISODE))
        for number in range(count)
    ]
    reckoned = reckon(policy, config, frames)
    Console(stderr=True, soft_wrap=True).print(f"reckoned: {reckoned[-1]}")
    before = sum(parameter.nbytes for parameter in policy.parameters())
    with watching_memory() as peak:
        start = perf_counter()
        plan = calibrate(policy, frames, config)
        seconds = perf_counter() - start
    decision = decision_of(RepairDecision, plan.decisions)
    found = {
        "frames": count,
        "settings": config.to_json(),
        "seconds": round(seconds, 1),
        "trials": len(decision.trials),
        "weights": bytes_text(before),
        "own memory at most": bytes_text(peak.private),
        "with mapped files": bytes_text(peak.resident),
        "refit tensors": 0 if plan.tensor_file is None else plan.tensor_file.size,
        "reckoned from the first layer": list(map(str, reckoned)),
    }
    if torch.cuda.is_available() and next(policy.parameters()).is_cuda:
        found["GPU memory at most"] = bytes_text(torch.cuda.max_memory_allocated())
    return found


def reckon(policy: CogACT, config: CompileConfig, frames: list[Frame]) -> list[Forecast]:
    """Return what calibration would say that these frames take, and 200."""
    run = DenseRun(capture(policy, config), batches_of(policy, frames), Shelf())
    start = run.start("front")
    start.advance(run.front)
    return [forecast(policy, run, start, config, count) for count in (len(frames), 200)]


def write_run(folder: Path, policy: CogACT) -> None:
    """Write a policy as a run directory in CogACT's layout."""
    (folder / "checkpoints").mkdir(parents=True)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in policy.state_dict().items():
        group, _, key = name.partition(".")
        groups.setdefault(group, {})[key] = tensor
    torch.save({"model": groups}, folder / "checkpoints" / "step-000001-epoch-00-loss=0.1000.pt")
    (folder / "config.json").write_text(json.dumps({"vla": {}}), encoding="utf-8")
    shutil.copy(DATA.parent / "golden" / "dataset_statistics.json", folder)


if __name__ == "__main__":
    main()

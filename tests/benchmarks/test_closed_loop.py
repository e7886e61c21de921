"""The closed loop in Meta-World: demonstrations, the environment against its expert, the demo policy at its tasks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evla_compile.demo.shipped_policy import DEMO_POLICY, calibration_frames
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.host.frames import read_frames

pytest.importorskip("metaworld", reason="needs the extra sim: make sim", exc_type=ImportError)

ASKED = ("--variant", "dense", "--variant", "dense@torch", "--episodes", "2")
ROOT = Path(__file__).parents[2]
EXPERT = """
import json, sys
import numpy as np
from benchmarks.closed_loop.simulation.environment import SimEnvironment
from benchmarks.closed_loop.simulation.tasks import TASKS
from evla_compile.demo.shipped_policy import DEMO_POLICY
from evla_compile.families.cogact.loading.checkpoint import load

processor = load(DEMO_POLICY).processor
statistics = processor.statistics_for(None)
low, high = np.array(statistics.low), np.array(statistics.high)
span = np.where(high > low, high - low, 1.0)
outcomes = {}
for name, task in TASKS.items():
    with SimEnvironment(task) as environment:
        for seed in range(6000, 6008):
            environment.reset(seed)
            for _ in range(150):
                action = environment.expert_action()
                sample = np.where(statistics.mask, 2.0 * (action - low) / span - 1.0, action)
                if environment.step(processor.actions(sample[None])[0]):
                    break
            outcomes[f"{name} {seed}"] = environment.success
print(json.dumps(outcomes))
"""
REPEAT = """
import hashlib, json
from benchmarks.closed_loop.simulation.environment import SimEnvironment
from benchmarks.closed_loop.simulation.tasks import TASKS

def told(environment):
    # whether the frame behind a reset already shows what MuJoCo computes from where things are
    import mujoco  # not before the environment has said how it renders
    before = environment.frame().copy()
    mujoco.mj_forward(environment._environment.model, environment._environment.data)
    return bool((before == environment.frame()).all())

def episode(environment, seed):
    environment.reset(seed, half_open=environment.task.half_open)
    trace = []
    for _ in range(30):
        trace.append([hashlib.sha256(environment.frame()).hexdigest(), environment.state().tolist()])
        environment.step(environment.expert_action())
    return trace

found = {}
for name, task in TASKS.items():
    with SimEnvironment(task) as environment:
        first, other = episode(environment, 1), episode(environment, 2)
        again = episode(environment, 1)
    with SimEnvironment(task) as environment:
        anew = episode(environment, 1)
        environment.reset(3)
        found[name] = [first == again, first == anew, first != other, told(environment)]
print(json.dumps(found))
"""


def run(*command: str, cwd: Path = ROOT) -> str:
    """Run Python by itself: the simulator's libraries warn on import, and tests turn warnings into errors."""
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_expert_succeeds_through_the_policys_action_path() -> None:
    outcomes = json.loads(run("-c", EXPERT).splitlines()[-1])
    assert len(outcomes) == 40
    assert sum(outcomes.values()) >= 0.95 * len(outcomes), [name for name, done in outcomes.items() if not done]


def test_a_seed_decides_an_episode_from_its_first_frame_on_whatever_ran_before() -> None:
    found = json.loads(run("-c", REPEAT).splitlines()[-1])
    assert all(all(same) for same in found.values()), found
    assert len(found) == 5


def test_demonstrations_train_a_policy(tmp_path: Path) -> None:
    """Two steps teach nothing: what counts is that each command takes what the one before made."""
    demonstrations, trained = str(tmp_path / "demonstrations"), str(tmp_path / "trained")
    tasks = ["--tasks", "reach", "window-open"]
    printed = run(
        "-m", "benchmarks.closed_loop.training.collect", demonstrations, "--episodes", "2", "--wander", "20", *tasks
    )
    assert printed.count("2 episodes, 0 dropped") == 2
    assert len(list(Path(demonstrations).glob("*/*.npz"))) == 4
    run("-m", "benchmarks.closed_loop.training.train", demonstrations, trained, "--steps", "2", "--batch", "2", *tasks)
    run("-m", "benchmarks.closed_loop.training.calibration_frames", f"{trained}/run")
    policy, frames = load(tmp_path / "trained" / "run"), read_frames(tmp_path / "trained" / "run" / "calibration")
    assert policy.sizes == load(DEMO_POLICY).sizes
    assert len(frames) == 200
    for frame, shipped in zip(frames, calibration_frames(), strict=True):
        assert (frame.instruction, frame.episode) == (shipped.instruction, shipped.episode)
        apart = np.asarray(frame.image).astype(float) - np.asarray(shipped.image)
        assert np.abs(apart).mean() < 0.5  # software rendering rounds differently from processor to processor


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two episodes a task of the dense demo policy on ONNX Runtime, and of the same in torch."""
    out = tmp_path_factory.mktemp("evaluation")
    run("-m", "benchmarks.closed_loop.evaluation", *ASKED, "--strips", "dense", "--out", str(out))
    contents: dict[str, Any] = json.loads((out / "results.json").read_text())
    episodes = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    return contents | {"folder": out, "episodes": episodes}


@pytest.mark.timeout(600)
def test_the_demo_policy_solves_its_tasks(evaluation: dict[str, Any]) -> None:
    success = evaluation["variants"]["dense"]["all"]["success"]
    assert success["episodes"] == 10
    assert success["successes"] >= 6


@pytest.mark.timeout(600)
def test_torch_and_onnx_agree(evaluation: dict[str, Any]) -> None:
    paired = evaluation["variants"]["dense@torch"]["paired"]
    assert (paired["gained"], paired["lost"]) == (0, 0)
    assert evaluation["variants"]["dense@torch"]["deviation_mm"] < 0.01


@pytest.mark.timeout(600)
def test_an_evaluation_goes_on_where_it_stopped(evaluation: dict[str, Any]) -> None:
    folder = evaluation["folder"]
    lines = (folder / "episodes.jsonl").read_text().splitlines()
    (folder / "episodes.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    run("-m", "benchmarks.closed_loop.evaluation", *ASKED, "--out", str(folder))
    again = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    kept = [json.dumps(entry) for entry in again[: len(lines) - 3]]
    assert kept == [json.dumps(json.loads(line)) for line in lines[:-3]]
    outcomes = [
        {json.dumps(e["work"]): [r.get("success", r["seed"]) for r in e["results"]] for e in entries}
        for entries in (evaluation["episodes"], again)
    ]
    assert outcomes[0] == outcomes[1]
    run("-m", "benchmarks.closed_loop.evaluation", *ASKED, "--variant", "mlp-75", "--out", str(folder))
    added = json.loads((folder / "results.json").read_text())["variants"]["mlp-75"]
    assert added["all"]["success"]["episodes"] == 10
    assert 0.0 < added["deviation_mm"] < 1.0


@pytest.mark.timeout(600)
def test_the_evaluation_writes_tables_and_pictures(evaluation: dict[str, Any]) -> None:
    folder = evaluation["folder"]
    assert "McNemar" in (folder / "results.md").read_text()
    for name in ("results.png", "strips.png"):
        assert (folder / name).stat().st_size > 10_000
    assert np.isfinite(evaluation["variants"]["dense"]["all"]["milliseconds"])

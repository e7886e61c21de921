"""The closed loop in Meta-World: demonstrations, the environment against its expert, and an evaluation end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("metaworld", reason="needs the extra sim: make sim", exc_type=ImportError)

CLOSED_LOOP = Path(__file__).parents[1] / "benchmarks" / "closed_loop"
EXPERT = """
import json, sys
import numpy as np
from sim_environment import SimEnvironment
from sim_tasks import TASKS
from sim_tokenizer import PAD_ID, make_tokenizer
from training_run import action_statistics
from evla_compile.processor import Processor

actions = []
for task in TASKS.values():
    with SimEnvironment(task) as environment:
        for seed in (1, 2):
            environment.reset(seed)
            while not environment.success:
                actions.append(environment.expert_action())
                environment.step(actions[-1])
statistics = action_statistics(np.stack(actions).astype(np.float32))
processor = Processor(
    tokenizer_json=make_tokenizer(), statistics={"metaworld": statistics}, image_side=112, pad_id=PAD_ID
)
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
import json
import numpy as np
from sim_environment import SimEnvironment
from sim_tasks import TASKS

def episode(environment, seed):
    environment.reset(seed, half_open=environment.task.half_open)
    trace = []
    for _ in range(30):
        trace.append([environment.frame().tobytes().hex()[:4096], environment.state().tolist()])
        environment.step(environment.expert_action())
    return trace

found = {}
for name, task in TASKS.items():
    with SimEnvironment(task) as environment:
        first, other = episode(environment, 1), episode(environment, 2)
        again = episode(environment, 1)
    with SimEnvironment(task) as environment:
        anew = episode(environment, 1)
    found[name] = [first == again, first == anew, first != other]
print(json.dumps(found))
"""


def run(*command: str, cwd: Path = CLOSED_LOOP) -> str:
    """Run Python by itself: the simulator's libraries warn on import, and tests turn warnings into errors."""
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_expert_succeeds_through_the_policys_action_path() -> None:
    outcomes = json.loads(run("-c", EXPERT).splitlines()[-1])
    assert len(outcomes) == 40
    assert sum(outcomes.values()) >= 0.95 * len(outcomes), [name for name, done in outcomes.items() if not done]


def test_a_seed_decides_an_episode_whatever_ran_before() -> None:
    found = json.loads(run("-c", REPEAT).splitlines()[-1])
    assert all(all(same) for same in found.values()), found
    assert len(found) == 5


@pytest.mark.timeout(900)
def test_from_demonstrations_to_a_paired_evaluation(tmp_path: Path) -> None:
    """Two steps of training teach nothing: what counts is that every command does its part, and resumes."""
    demonstrations, trained, out = (str(tmp_path / name) for name in ("demonstrations", "trained", "out"))
    tasks = ["--tasks", "reach", "window-open"]
    printed = run("collect.py", demonstrations, "--episodes", "2", *tasks)
    assert printed.count("2 episodes, 0 dropped") == len(list(Path(demonstrations).glob("*"))) == 2
    assert len(list(Path(demonstrations).glob("*/*.npz"))) == 4
    run("train.py", demonstrations, trained, "--steps", "2", "--batch", "2", *tasks)
    run("calibration_frames.py", trained)
    asked = ["--policy", f"{trained}/run", "--calibration", f"{trained}/calibration", *tasks]
    asked += ["--episodes", "1", "--out", out]
    asked += [word for name in ("dense", "dense@torch", "layers-8") for word in ("--variant", name)]
    run("evaluate.py", *asked, "--strips", "layers-8")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    variants = results["variants"]
    assert list(variants) == ["dense", "dense@torch", "layers-8"]
    assert variants["dense@torch"]["deviation_mm"] < 0.01
    assert variants["layers-8"]["flops"] < 0.9 * variants["dense"]["flops"]
    assert variants["dense"]["all"]["success"]["episodes"] == 2
    for name in ("results.png", "strips.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
    lines = (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()
    (tmp_path / "out" / "episodes.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    run("evaluate.py", *asked)
    again = (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()
    assert again[:-2] == lines[:-2]
    assert sorted(map(_outcome, again)) == sorted(map(_outcome, lines))


def _outcome(line: str) -> str:
    """Return what an entry says, its times left out."""
    entry = json.loads(line)
    results = [{name: value for name, value in result.items() if name != "milliseconds"} for result in entry["results"]]
    return json.dumps([entry["work"], results])

"""What a technique costs: two files, a line where the configuration is made, a line in the pipeline, and imports.

The technique is in toy_technique/: a budget, and a pass. Its pass has the four tests of every pass here.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from evla_compile.errors import PassError
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT, NoisePrediction
from evla_compile.graph.contract import measure
from evla_compile.settings.config import CompileConfig
from tests.settings.toy_technique.rectify_mlp import RectifyMLP

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy_technique"
FILES = {"rectified.py": "settings/budgets/rectified.py", "rectify_mlp.py": "passes/rectify_mlp.py"}
LINES = (
    ("settings/config.py", "    CallSettings,\n", "    RectifiedBudget,\n"),
    (
        "calibration/decoder_passes.py",
        "        lossy(LayerDecision, lambda layers: PruneLayers(keep=layers.keep)),\n",
        "        lossy(RectifiedDecision, lambda rectified: RectifyMLP(layers=rectified.layers)),\n",
    ),
)
IMPORTS = (
    ("settings/config.py", "from evla_compile.settings.budgets.rectified import RectifiedBudget\n"),
    ("calibration/decoder_passes.py", "from evla_compile.settings.budgets.rectified import RectifiedDecision\n"),
    ("calibration/decoder_passes.py", "from evla_compile.passes.rectify_mlp import RectifyMLP\n"),
)
TIME = torch.tensor([30.0])


def test_two_files_and_a_line_each_bring_a_technique_all_the_way(tmp_path: Path) -> None:
    package = tmp_path / "evla_compile"
    shutil.copytree(ROOT / "evla_compile", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "data", "golden"):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / name).symlink_to(ROOT / "tests" / name)
    for name, place in FILES.items():
        shutil.copy(TOY / name, package / place)
    for place, before, line in LINES:
        text = (package / place).read_text()
        assert text.count(before) == 1
        (package / place).write_text(text.replace(before, before + line))
    for place, line in IMPORTS:
        text = (package / place).read_text()
        (package / place).write_text(text.replace("\nfrom evla_compile", f"\n{line}from evla_compile", 1))
    shutil.copy(TOY / "whole_way.py", tmp_path / "tests" / "test_whole_way.py")
    command = (sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " 5 passed" in f" {done.stdout.splitlines()[-1]}"


def test_the_guide_shows_this_code() -> None:
    """Apart from white space, in which formatters of Markdown differ."""
    guide = (ROOT / "docs/contributing/writing-a-pass.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (*TOY.glob("*.py"), Path(__file__)))
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 6
    assert [block for block in blocks if "".join(block.split()) not in "".join(sources.split())] == []
    for _, before, line in LINES:
        assert f" {before}+{line}" in guide


def test_it_equals_the_policy_with_other_activations_and_has_its_operators(
    small_policy: CogACT, small_graph: fx.GraphModule, small_config: CompileConfig, small_inputs: tuple[Tensor, ...]
) -> None:
    oracle = deepcopy(small_policy)
    for layer in (1, 3):
        mlp = oracle.get_submodule(f"llm_backbone.llm.model.layers.{layer}.mlp")
        mlp.act_fn = nn.ReLU()
    rewritten, report = RectifyMLP(layers=(1, 3))(small_graph)
    inputs = (*small_inputs, TIME)
    assert torch.equal(rewritten(*inputs), NoisePrediction(oracle)(*inputs, cfg_scale=1.5))
    assert (report.changes, report.exact) == (2, False)
    assert report.after == measure(rewritten) == measure(capture(oracle, small_config))


def test_the_input_graph_is_untouched(
    small_graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_graph):
        RectifyMLP(layers=(1, 3))(small_graph)


def test_no_layers_change_nothing(small_graph: fx.GraphModule) -> None:
    same, report = RectifyMLP(layers=())(small_graph)
    assert report.changes == 0
    assert str(same.graph) == str(small_graph.graph)


def test_layers_that_the_graph_lacks_are_refused(small_graph: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"no decoder layers \[4\]; it has \[0, 1, 2, 3\]"):
        RectifyMLP(layers=(1, 4))(small_graph)

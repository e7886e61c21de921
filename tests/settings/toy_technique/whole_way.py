"""The toy technique in a copy of the package that has it: from a configuration and the command line to the graph.

Run by `test_toy_technique`; pytest does not collect it here, where the package lacks the technique.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from PIL import Image

import evla_compile as evla
from evla_compile import cli
from evla_compile.cli.setting_options import OPTIONS
from evla_compile.cli.settings import read_config
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.compiler.pipeline import build_passes
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.sites import module_path
from evla_compile.host.frames import Frame
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, check_plan, plan_without_calibration
from evla_compile.settings.sizes import ModelSizes

aten = torch.ops.aten
DENSE = CompileConfig.dense(text_tokens=9, ddim_steps=1)
TWO: dict[str, Any] = {"relu_layers": 2}
FOUR: dict[str, Any] = {"relu_layers": 4}
NEGATIVE: dict[str, Any] = {"relu_layers": -1}


@pytest.fixture(scope="module")
def compiled(small_policy: CogACT) -> CompiledPolicy:
    """Compiled with a budget of two layers, by a plan that was measured on one frame."""
    config = replace(DENSE, keep_layers=3, **TWO)
    plan = evla.calibrate(small_policy, [Frame(Image.new("RGB", (4, 4)), "pick")], config, progress=False)
    return evla.compile(small_policy, config, plan=plan)


def test_the_graph_computes_a_relu_where_the_plan_says(compiled: CompiledPolicy) -> None:
    importance, kept = compiled.plan.layer_importance, compiled.plan.keep_layers
    chosen = tuple(sorted(sorted(kept, key=lambda layer: importance[layer])[:2]))
    names = [report.name for report in compiled.report.passes]
    assert names[1:3] == [f"PruneLayers(keep={kept})", f"RectifyMLP(layers={chosen})"]
    found = compiled.graph.graph.find_nodes(op="call_function", target=aten.relu.default)
    assert [module_path(node) for node in found] == [f"{COGACT.decoder_layers}.{layer}.mlp.act_fn" for layer in chosen]


def test_the_plan_s_json_holds_the_decision(compiled: CompiledPolicy, tmp_path: Path) -> None:
    compiled.plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert list(data)[-1] == "relu_layers"
    assert len(data["relu_layers"]) == 2
    assert Plan.load(tmp_path / "plan.json") == compiled.plan
    del data["relu_layers"]  # as in a plan from before the technique
    check_plan(Plan.from_json(data), replace(DENSE, keep_layers=3), compiled.sizes)
    with pytest.raises(evla.CalibrationError, match="the settings ask for relu_layers=2"):
        check_plan(Plan.from_json(data), compiled.config, compiled.sizes)


def test_the_configuration_has_the_setting(small_policy: CogACT) -> None:
    config = replace(DENSE, **TWO)
    assert config.to_json()["relu_layers"] == 2
    assert CompileConfig.from_json(config.to_json()) == config
    assert DENSE.to_json()["relu_layers"] == 0
    with pytest.raises(ValueError, match="relu_layers=-1: expected a whole number from 0 to 256"):
        replace(DENSE, **NEGATIVE)
    with pytest.raises(ValueError, match="relu_layers=4: 3 decoder layers stay"):
        replace(DENSE, keep_layers=3, **FOUR).resolve(small_policy.sizes)
    with pytest.raises(evla.CalibrationError, match=r"relu_layers=2 .*give calibration= frames"):
        evla.compile(small_policy, config)


def test_the_command_line_has_the_option() -> None:
    group: Any = typer.main.get_command(cli.app)
    for command in ("compile", "estimate", "doctor"):
        option = next(each for each in group.commands[command].params if each.name == "relu_layers")
        assert (option.opts, option.help) == (["--relu-layers"], "Decoder layers whose MLP computes a ReLU.")
    given = dict.fromkeys(OPTIONS) | TWO
    assert read_config(given, preset=None, dense=True) == replace(CompileConfig.dense(), **TWO)


def test_a_plan_without_it_is_written_as_before_and_needs_no_pass(small_sizes: ModelSizes) -> None:
    plan = plan_without_calibration(small_sizes, DENSE)
    assert "relu_layers" not in plan.to_json()
    assert all(rewrite.exact for rewrite in build_passes(DENSE, plan, small_sizes))

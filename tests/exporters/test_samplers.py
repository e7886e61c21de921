"""Every kind of sampler in ONNX, denoising step by denoising step, against the torch graph."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import evla_compile as evla
from evla_compile.artifact.cases import read_cases
from evla_compile.artifact.manifest import read_manifest
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.frames import Frame
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.tolerances import TOLERANCES, check
from evla_compile.verification.verify import verify


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"cache_steps": (0, 3, 7)}, 10),
        ({"cache_steps": (0, 1, 4), "cache_extrapolate": True, "cfg_scale": 1.0, "ddim_steps": 6}, 6),
        ({"cache_steps": 2, "cache_extrapolate": True, "ddim_steps": 4}, 4),
        ({"solver": "dpm++", "solver_timesteps": (90, 45, 10), "cfg_scale": 1.0}, 3),
        ({"solver": "dpm++", "solver_steps": 2}, 2),
    ],
)
def test_the_file_computes_what_the_graph_does(
    settings: dict[str, Any], steps: int, tiny_policy: CogACT, frame: Image.Image, tmp_path: Path
) -> None:
    frames = [Frame(frame, "open the top drawer")]
    compiled = evla.compile(tiny_policy, replace(CompileConfig.dense(), **settings), calibration=frames, progress=False)
    compiled.export(tmp_path / "policy")
    verify(tmp_path / "policy")
    (case, *_) = read_cases(tmp_path / "policy" / "cases.npz", read_manifest(tmp_path / "policy" / "manifest.json"))
    assert [name for name in case.stages if name.startswith("denoising")] == [
        f"denoising.{step}" for step in range(steps - 1)
    ]
    found = evla.runtime.load(tmp_path / "policy", threads=1).predict_action(*frames[0], "bridge_orig", seed=4)
    expected = compiled.predict_action(*frames[0], "bridge_orig", seed=4)
    check("actions", found, expected, tolerance=TOLERANCES.lowered)

"""Kills a writer before each of its file operations in turn, and looks at what is left; a script, and free of torch.

Usage: killed_writers.py SCENARIO FOLDER. Prints JSON: how many operations there are, and after how many kills the place
held the old files, the new ones, or neither until the next writer finished the move.
"""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from evla_compile.artifact.files import ArtifactFiles, check_files, check_target, find_manifest, writing
from evla_compile.artifact.manifest import Manifest, read_manifest, write_manifest
from evla_compile.artifact.records import FileRecord, Part, TensorSpec
from evla_compile.errors import ArtifactError
from evla_compile.exporters import build
from evla_compile.exporters.to_tensorrt import BuiltEngine
from evla_compile.host.processor import ActionStatistics
from evla_compile.scratch import remove_stale, replacing
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.engine_settings import EngineSettings
from evla_compile.settings.plan import Plan

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "fcntl.flock")
INPUTS = (
    TensorSpec(name="image", dtype="uint8", shape=(1, 28, 28, 3)),
    TensorSpec(name="input_ids", dtype="int64", shape=(1, 20)),
    TensorSpec(name="text_length", dtype="int64", shape=(1,)),
    TensorSpec(name="noise", dtype="float32", shape=(1, 16, 7)),
)
OUTPUTS = (TensorSpec(name="samples", dtype="float32", shape=(1, 16, 7)),)
RTX = EngineSettings(flavour="tensorrt_rtx", compute_capabilities=("8.9",))


def export(target: Path, version: str) -> None:
    """Write an artifact; the old one has external data, the new one has none."""
    files = ArtifactFiles.of(target)
    with writing(target) as folder:
        names = [files.model, files.tokenizer, files.report, files.cases, *([files.data] if version == "old" else [])]
        for name in names:
            (folder / name).write_text(f"{version} {name}", encoding="utf-8")
        write_manifest(describe(folder, files), folder / files.manifest)


def describe(folder: Path, files: ArtifactFiles) -> Manifest:
    measured = {path.name: FileRecord.measure(path) for path in folder.iterdir()}
    data = (measured[files.data],) if files.data in measured else ()
    return Manifest(
        created_by="0.0.0",
        parts=(Part(name="policy", model=measured[files.model], data=data, inputs=INPUTS, outputs=OUTPUTS),),
        engine=None,
        precision="float32",
        tokenizer=measured[files.tokenizer],
        report=measured[files.report],
        cases=measured[files.cases],
        inputs=INPUTS,
        outputs=OUTPUTS,
        config=CompileConfig(keep_layers=(0, 2), mlp_keep=0.5, text_tokens=20),
        plan=Plan(decisions=(LayerDecision(keep=(0, 2)),)),
        statistics={"toy": ActionStatistics(low=(-1.0,) * 7, high=(1.0,) * 7, mask=(True,) * 7)},
        pad_id=3,
        vocabulary=64,
        opset=23,
        versions={},
    )


def build_engine(target: Path, version: str) -> None:
    """Build an engine for an artifact, by a builder that only writes a text."""

    def stand_in(model: Path, engine: Path, settings: EngineSettings, *, progress: bool) -> BuiltEngine:
        engine.write_text(f"{version} engine", encoding="utf-8")
        return BuiltEngine(layers=1, attentions=0, inputs=tuple(map(str, INPUTS)), outputs=tuple(map(str, OUTPUTS)))

    library = SimpleNamespace(__version__="1.7.1.116")
    with (
        patch.object(build, "to_tensorrt", stand_in),
        patch.object(build, "import_flavour", lambda flavour: library),
        patch.object(build, "find_flavour", lambda settings: "tensorrt_rtx"),
    ):
        build.build_engine(target, RTX, progress=False)


def write_file(target: Path, version: str) -> None:
    with replacing(target) as new:
        new.write_text(version, encoding="utf-8")


def fresh(target: Path) -> None:
    """Nothing is there before."""


def engine_again(target: Path) -> None:
    export(target, "old")
    build_engine(target, "old")


Step = Callable[[Path, str], None]
SCENARIOS: Mapping[str, tuple[str, Callable[[Path], None], Step]] = {
    "fresh folder": ("policy", fresh, export),
    "fresh file": ("policy.onnx", fresh, export),
    "folder again": ("policy", lambda target: export(target, "old"), export),
    "file again": ("policy.onnx", lambda target: export(target, "old"), export),
    "engine": ("policy", lambda target: export(target, "old"), build_engine),
    "engine again": ("policy.onnx", engine_again, build_engine),
    "file of its own": ("plan.json", lambda target: write_file(target, "old"), write_file),
}


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder; files with what they hold."""
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8") if path.is_file() else "a folder"
        for path in sorted(folder.rglob("*"))
    }


def killed(action: Callable[[], None], operation: int) -> bool:
    """Run an action in a process of its own that SIGKILL ends before a file operation; tell whether it came so far."""
    child = os.fork()
    if child == 0:
        count = iter(range(operation + 1))

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event in OPERATIONS and next(count, None) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"operation {operation}: status {status}"
    return status != 0


def in_place(root: Path) -> dict[str, str]:
    """What a reader sees: everything but scratch folders."""
    return {name: text for name, text in contents(root).items() if ".partial-" not in name}


def check_readable(target: Path) -> None:
    """Raise for an artifact that can be found and is not whole."""
    try:
        place = find_manifest(target)
    except ArtifactError:
        return
    check_files(read_manifest(place).files, place.parent)


def next_writer(target: Path, step: Step) -> None:
    if step is write_file:
        remove_stale(target)
    else:
        check_target(target)


def main(scenario: str, folder: Path) -> None:
    name, prepare, step = SCENARIOS[scenario]

    def prepared(root: Path) -> Path:
        root.mkdir()
        (root / "precious.txt").write_text("of somebody else", encoding="utf-8")
        prepare(root / name)
        return root / name

    template = prepared(folder / "old").parent
    old = contents(template)
    step(prepared(folder / "new"), "new")
    new = contents(folder / "new")
    assert new != old
    found: Counter[str] = Counter()
    operation = 0
    while True:
        root = folder / str(operation)
        shutil.copytree(template, root)
        target = root / name
        if not killed(lambda: step(target, "new"), operation):  # noqa: B023 - called at once
            break
        check_readable(target)
        seen = in_place(root)
        found["old" if seen == old else "new" if seen == new else "unfinished"] += 1
        next_writer(target, step)
        after = contents(root)
        assert after in (old, new), f"operation {operation} left {after}"
        assert after == new or seen == old, f"operation {operation} undid what was in place"
        operation += 1
    print(json.dumps({"operations": operation, **found}))  # noqa: T201 - a script


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

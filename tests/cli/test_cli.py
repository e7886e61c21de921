"""The command line: each command on the tiny golden model, and each bad input that can reach it, as users meet them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

from evla_compile import cli, runtime
from evla_compile.artifact.files import find_manifest
from evla_compile.artifact.manifest import read_manifest
from evla_compile.calibration import calibrate as calibration
from evla_compile.cli import run
from evla_compile.cli.settings import read_plan
from evla_compile.compiler import pipeline
from evla_compile.errors import EvlaError
from evla_compile.families.cogact.loading import checkpoint
from tests.cli.command_line import Outcome, evla, refused

Groups = dict[str, dict[str, Tensor]]
INSTRUCTION, KEY = "pick up the apple", "bridge_orig"
LONG = "push the red apple and the yellow sponge to the left edge of the wooden table and then to the right edge"
BUDGETS = ("--preset", "l22-t56", "--visual-tokens", "0.22", "--cache-interval", "2", "--ddim-steps", "2")


def write_frames(folder: Path, frame: Image.Image, *instructions: str) -> Path:
    folder.mkdir()
    frame.save(folder / "0.png")
    lines = [json.dumps({"image": "0.png", "instruction": instruction}) for instruction in instructions]
    (folder / "frames.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def frames(tmp_path_factory: pytest.TempPathFactory, frame: Image.Image) -> Path:
    """A FRAMES folder of two observations."""
    return write_frames(
        tmp_path_factory.mktemp("observations") / "frames", frame, "move sponge near apple", INSTRUCTION
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, frames: Path) -> tuple[Path, Outcome]:
    """The artifact that `evla compile` makes of the tiny model, and what it said."""
    out = tmp_path_factory.mktemp("compiled") / "artifact"
    return out, evla("compile", tiny_checkpoint, "--calibration", frames, "--out", out, *BUDGETS)


@pytest.fixture(scope="module")
def artifact(compiled: tuple[Path, Outcome]) -> Path:
    out, outcome = compiled
    assert outcome.status in (0, None), outcome.err
    return out


@pytest.fixture
def spoiled(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact whose tokenizer has been edited."""
    shutil.copytree(artifact, tmp_path / "spoiled")
    tokenizer = tmp_path / "spoiled" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"apple", b"APPLE", 1))
    return tmp_path / "spoiled"


@pytest.fixture
def photo(frame: Image.Image, tmp_path: Path) -> Path:
    frame.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def run_directory(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny model's run directory, to be spoiled."""
    shutil.copytree(tiny_checkpoint, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def refused_early(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`evla compile` that must refuse before the first long step, and must leave nothing behind."""

    def capture(*_: object) -> None:
        pytest.fail("the policy was captured before the refusal")

    for module in (calibration, pipeline):
        monkeypatch.setattr(module, "capture", capture)

    def compile_policy(*arguments: object, run: Path = tiny_checkpoint, out: Path | None = None) -> str:
        before = sorted(tmp_path.rglob("*"))
        message = refused(evla("compile", run, "--out", out or tmp_path / "out", *arguments))
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return compile_policy


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("the policy was loaded before the refusal"))


def save_groups(run: Path, edit: Callable[[Groups], object]) -> None:
    (file,) = run.glob("checkpoints/*.pt")
    groups: Groups = torch.load(file)["model"]
    edit(groups)
    torch.save({"model": groups}, file)


def test_help_lists_every_command() -> None:
    outcome = evla("--help")
    assert not outcome.status
    assert all(command in outcome.words for command in ("demo", "compile", "inspect", "estimate", "run", "verify"))


@pytest.mark.parametrize(
    "arguments", [("fly",), ("compile", "run"), ("run", "x", "--seed", "one"), ("verify", "x", "--threads", "0")]
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    outcome = evla(*arguments)
    assert outcome.status == 2
    assert "Usage: evla" in outcome.err


def test_compile_reports_its_passes_and_what_to_do_next(compiled: tuple[Path, Outcome]) -> None:
    out, outcome = compiled
    assert not outcome.status
    for expected in (
        "PruneLayers(",
        "SelectTokens(visual_tokens=56",
        "cognition",
        f"evla verify {out}",
        "--unnorm-key",
    ):
        assert expected in outcome.words
    table = outcome.out.partition("Written to")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "\u2026" not in table
    assert "load the policy" in outcome.err


def test_compile_records_its_settings_in_numbers_of_the_policy(artifact: Path) -> None:
    config = read_manifest(find_manifest(artifact)).config
    assert (config.keep_layers, config.visual_tokens, config.cache_interval, config.ddim_steps) == (4, 56, 2, 2)
    assert (config.mlp_keep, config.key_tokens, config.cfg_scale) == (0.75, 4, 1.5)


def test_compile_writes_an_engine_in_half_precision(tiny_checkpoint: Path, frames: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13, which has wheels for x86-64 alone")
    out = tmp_path / "policy.engine"
    settings = ("--dense", "--ddim-steps", 1, "--precision", "float16", "--parts", 2)
    outcome = evla("compile", tiny_checkpoint, "--calibration", frames, "--out", out, *settings)
    assert not outcome.status, outcome.err
    manifest = read_manifest(find_manifest(out))
    assert manifest.engine is not None
    assert [file.name for file in manifest.engine.files] == ["policy.perception.engine", "policy.action.engine"]
    assert manifest.precision == "float16"
    shown = evla("verify", tmp_path / "policy.manifest.json", "--stages")
    assert not shown.status, shown.err
    assert "layers.5" in shown.words
    assert f"precision {manifest.precision} engine TensorRT-RTX" in evla("inspect", out.with_suffix(".onnx")).words


def test_run_prints_the_actions_of_the_runtime(artifact: Path, photo: Path, frame: Image.Image) -> None:
    instruction = "pick up the [red] apple"
    outcome = evla("run", artifact, "--image", photo, "--instruction", instruction, "--unnorm-key", KEY, "--seed", "3")
    assert not outcome.status
    assert f'Actions for "{instruction}"' in outcome.words
    assert "step dx dy dz droll dpitch dyaw gripper" in outcome.words
    expected = runtime.load(artifact).predict_action(frame, instruction, KEY, seed=3)
    rows = [line.split() for line in outcome.out.splitlines() if len(line.split()) == 8][-16:]
    printed = np.array([[float(cell) for cell in row[1:]] for row in rows])
    np.testing.assert_allclose(printed, expected, rtol=0, atol=1e-4)


def test_run_prints_json(artifact: Path, photo: Path, frame: Image.Image) -> None:
    outcome = evla("run", artifact, "--image", photo, "--instruction", INSTRUCTION, "--unnorm-key", KEY, "--json")
    result = json.loads(outcome.out)
    assert result["names"] == ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
    expected = runtime.load(artifact).predict_action(frame, INSTRUCTION, KEY)
    np.testing.assert_allclose(result["actions"], expected, rtol=0, atol=1e-5)


def test_run_turns_a_photo_the_right_way_up(artifact: Path, photo: Path, frame: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn the pixels clockwise
    frame.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    arguments = ("--instruction", INSTRUCTION, "--unnorm-key", KEY, "--json")
    upright, turned = (evla("run", artifact, "--image", path, *arguments) for path in (photo, tmp_path / "turned.png"))
    assert turned.status in (0, None), turned.err
    assert json.loads(turned.out)["actions"] == json.loads(upright.out)["actions"]


def test_run_imports_no_torch(artifact: Path, photo: Path) -> None:
    arguments = ["run", str(artifact), "--image", str(photo), "--instruction", INSTRUCTION, "--unnorm-key", KEY]
    code = (
        "import sys\n"
        "from evla_compile.cli import main\n"
        f"sys.argv = ['evla', *{arguments!r}]\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gripper" in process.stdout
    assert process.stdout.splitlines()[-1] == "[]"


def test_verify_says_what_it_proved(artifact: Path) -> None:
    outcome = evla("verify", artifact, "--threads", "1")
    assert not outcome.status
    assert "all shapes static; 2 recorded cases, 9 stages each, largest relative error samples" in outcome.words


def test_inspect_shows_a_checkpoint(tiny_checkpoint: Path) -> None:
    outcome = evla("inspect", tiny_checkpoint, columns=120)
    assert not outcome.status
    (file,) = tiny_checkpoint.glob("checkpoints/*.pt")
    groups: Groups = torch.load(file, mmap=True)["model"]
    tensors = [tensor for keys in groups.values() for tensor in keys.values()]
    for expected in (
        "vision_backbone.dino_featurizer",
        "6 layers of 64, 4 heads",
        f"{sum(tensor.numel() for tensor in groups['llm_backbone'].values()):,} float32",
        f"total {sum(tensor.numel() for tensor in tensors):,} {sum(tensor.nbytes for tensor in tensors) / 1e6:.1f}",
        "dtype MB",
        "frame: 224 x 224 pixels",
        "datasets: bridge_orig, fractal20220817_data",
        "tokenizer: tokenizer.json in the run directory",
        f"evla estimate {tiny_checkpoint}",
    ):
        assert expected in outcome.words


def test_inspect_imports_and_counts_nothing_that_it_does_not_show(tiny_checkpoint: Path) -> None:
    code = (
        "import sys\n"
        "from evla_compile.cli import main\n"
        f"sys.argv = ['evla', 'inspect', {str(tiny_checkpoint)!r}]\n"
        "unwanted = ('transformers', 'onnx', 'evla_compile.families.cogact.capture')\n"
        "try:\n    main()\n"
        "finally:\n    print([name for name in unwanted if name in sys.modules])\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vision_backbone.dino_featurizer" in process.stdout
    assert process.stdout.splitlines()[-1] == "[]"


def test_inspect_says_that_a_tokenizer_is_missing(run_directory: Path) -> None:
    (run_directory / "tokenizer.json").unlink()
    assert "tokenizer: none here; give --tokenizer" in evla("inspect", run_directory).words


def test_inspect_refuses_parts_of_different_models(run_directory: Path) -> None:
    (file,) = run_directory.glob("checkpoints/*.pt")
    contents = torch.load(file)
    contents["model"]["projector"]["projector.0.weight"] = torch.zeros(96, 7)
    torch.save(contents, file)
    message = refused(evla("inspect", run_directory))
    assert str(file) in message
    assert "input width of the projector" in message


def test_estimate_shows_a_run_directory_and_the_configurations_asked_for(tiny_checkpoint: Path) -> None:
    outcome = evla("estimate", tiny_checkpoint, "--dense", "--text-tokens", "20")
    assert not outcome.status
    for expected in (
        "Size and operations",
        "By component",
        "Roofline, us",
        "% of upstream",
        "lower bound",
        "20 text tokens",
    ):
        assert expected in outcome.words
    assert "l22-t56" not in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "\u2026" not in outcome.out
    assert "count the graphs of dense" in outcome.message


def test_estimate_prints_json(tiny_checkpoint: Path) -> None:
    outcome = evla("estimate", tiny_checkpoint, "--dense", "--dtype", "float32", "--json")
    assert not outcome.status
    found = json.loads(outcome.out)
    assert list(found) == ["upstream", "dense"]
    assert found["dense"]["dtype"] == "float32"
    assert 0 < found["dense"]["total"]["flops"] < found["upstream"]["total"]["flops"]
    assert 0 < found["dense"]["roofline_seconds"]["agx-orin"] < 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--preset", "l9"), "unknown preset 'l9'; expected one of balanced"),
        (("--dense", "--text-tokens", "3"), "text_tokens=3"),
    ],
)
def test_estimate_refuses_what_cannot_be_compared(
    tiny_checkpoint: Path, arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(evla("estimate", tiny_checkpoint, *arguments))


def test_estimate_names_what_is_neither_a_size_nor_a_run_directory(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(evla("estimate", tmp_path))


@pytest.mark.parametrize("name", ["", "model.onnx", "manifest.json"])
def test_inspect_shows_an_artifact(artifact: Path, name: str) -> None:
    outcome = evla("inspect", artifact / name)
    manifest = read_manifest(find_manifest(artifact))
    assert not outcome.status
    for expected in (
        "keep_layers 4",
        "visual_tokens 56",
        "image uint8[1, 224, 224, 3]",
        "samples float32[1, 16, 7]",
        f"model.onnx, {manifest.parts[0].model.size:,} bytes",
        "calibrated on 2 frames",
        f"torch {torch.__version__}",
    ):
        assert expected in outcome.words


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--keep-layers", "some"), "--keep-layers some: expected a count as in 22, a share as in 0.69"),
        (("--keep-layers", "7"), "keep_layers=7: the decoder has 6 layers; use keep_layers=1 to 6"),
        (("--keep-layers", "0"), "keep_layers=0"),
        (("--keep-layers", "0,1,9"), "the decoder has the layers 0 to 5"),
        (("--keep-layers", "0,1,1"), "indices must ascend without repeats"),
        (("--keep-layers", "2,1"), "indices must ascend without repeats"),
        (("--keep-layers", "2"), "needs two layers below it and one above"),
        (("--visual-tokens", "few"), "--visual-tokens few: expected a count as in 56, a share as in 0.22, or all"),
        (("--keep-layers", "4", "--visual-tokens", "257"), "visual_tokens=257: the policy sees 256 patches"),
        (("--visual-tokens", "3", "--token-rule", "relevance"), "visual_tokens=3 is below key_tokens=4"),
        (("--mlp-keep", "0"), "mlp_keep=0.0: expected a number in (0.0, 1.0]"),
        (("--task-share", "2"), "task_share=2.0: expected a number in [0.0, 1.0]"),
        (("--cfg-scale", "0.5"), "cfg_scale=0.5"),
        (("--cache-interval", "0"), "cache_interval=0"),
        (("--batch-size", "0"), "batch_size=0"),
        (("--ddim-steps", "18"), "ddim_steps=18 has no integer stride over 100 steps; valid: 1, 2, 3, 4, 5"),
        (("--preset", "l1-t1"), "unknown preset 'l1-t1'; expected one of balanced, faithful, fast, l22-t112"),
        (("--dense", "--preset", "l22-t56"), "--dense and --preset l22-t56 exclude each other"),
        (("--dense", "--opset", "17"), "--opset 17: expected one from 18 to 23"),
        (("--dense", "--parts", "99"), "parts=99: the policy keeps 6 decoder layers"),
        (("--dense", "--keep-layers", "0,1,2,4", "--parts", "6"), "parts=6: the policy keeps 4 decoder layers"),
        ((), "give calibration= frames of the robot's task"),
        (("--keep-layers", "4.5"), "keep_layers=4.5: expected a count from 1 up, or a share above 0.0"),
        (("--keep-layers", "nan"), "keep_layers=nan: expected a count from 1 up, or a share above 0.0"),
        (("--key-tokens", "most"), "--key-tokens most: expected a count as in 4, or a share as in 0.016"),
        (("--dense", "--tokenizer", "/nowhere"), "tokenizer='/nowhere': expected a tokenizer.json or its folder"),
        (("--dense", "--plan", "/nowhere.json"), "plan /nowhere.json"),
        (("--dense", "--calibration", "/nowhere"), "/nowhere does not exist: expected a folder with frames.jsonl"),
    ],
)
def test_compile_refuses_settings(refused_early: Callable[..., str], arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refused_early(*arguments)


@pytest.mark.parametrize("arguments", [("--keep-layers", "7"), ("--keep-layers", "4"), ("--dense", "--opset", "17")])
@pytest.mark.usefixtures("no_loading")
def test_compile_refuses_settings_before_it_casts_weights(
    refused_early: Callable[..., str], arguments: tuple[str, ...]
) -> None:
    refused_early(*arguments)


@pytest.mark.usefixtures("no_loading")
def test_compile_refuses_a_plan_for_other_budgets(
    refused_early: Callable[..., str], artifact: Path, tmp_path: Path
) -> None:
    read_manifest(find_manifest(artifact)).plan.save(tmp_path / "plan.json")
    assert "the settings ask for keep_layers=3" in refused_early("--keep-layers", "3", "--plan", tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "is empty: expected at least one observation"),
        ("{", "not JSON"),
        ('{"image": "0.png"}', 'expected {"image": path, "instruction": text}'),
        ('{"image": "1.png", "instruction": "go"}', "1.png cannot be read"),
        ('{"image": "grey.png", "instruction": "go"}', "grey.png is greyscale (PIL mode 'L'): expected 8-bit RGB"),
        (json.dumps({"image": "0.png", "instruction": LONG}), "its budget is 32: shorten the instruction"),
        ('{"image": "0.png", "instruction": " "}', "expected a text such as 'pick coke can'"),
    ],
)
def test_compile_refuses_frames(
    refused_early: Callable[..., str], frame: Image.Image, tmp_path: Path, line: str, expected: str
) -> None:
    folder = write_frames(tmp_path / "frames", frame)
    frame.convert("L").save(folder / "grey.png")
    (folder / "frames.jsonl").write_text(line + "\n", encoding="utf-8")
    assert expected in refused_early("--keep-layers", "4", "--calibration", folder)


def test_compile_refuses_a_place_that_is_not_ours(refused_early: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "mine" / "policy.onnx").write_text("another's")
    assert "holds policy.onnx, thesis.tex" in refused_early("--dense", out=tmp_path / "mine")
    assert "holds policy.onnx, which no manifest of ours lists" in refused_early(
        "--dense", out=tmp_path / "mine" / "policy.onnx"
    )


def test_compile_refuses_a_place_that_cannot_be_written(refused_early: Callable[..., str], photo: Path) -> None:
    assert "cannot be written" in refused_early("--dense", out=photo / "out")
    assert "cannot be written" in refused_early("--dense", out=photo.parent / "nowhere" / "out")


def test_compile_refuses_a_missing_or_truncated_checkpoint(
    refused_early: Callable[..., str], run_directory: Path
) -> None:
    assert "no such file or folder" in refused_early("--dense", run=run_directory.parent / "none")
    (file,) = run_directory.glob("checkpoints/*.pt")
    file.write_bytes(file.read_bytes()[:100_000])
    assert "truncated or damaged" in refused_early("--dense", run=run_directory)
    file.unlink()
    assert "expected exactly one checkpoints/*.pt, found 0" in refused_early("--dense", run=run_directory)


def test_compile_takes_the_moving_average_of_the_head_where_it_is_asked_for(
    refused_early: Callable[..., str], run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_groups(run_directory, lambda groups: groups.update(ema_diffusion=groups.pop("action_model")))
    assert "load it with use_ema=True (evla compile --use-ema)" in refused_early("--dense", run=run_directory)

    def load(*_: object, use_ema: bool, **__: object) -> None:
        raise EvlaError(f"loaded with {use_ema}")

    monkeypatch.setattr(checkpoint, "load", load)
    assert "loaded with True" in refused_early("--dense", "--use-ema", run=run_directory)


@pytest.mark.parametrize("arguments", [("--dense", "--no-verify"), BUDGETS])
def test_compile_names_a_weight_that_is_not_finite_and_leaves_nothing(
    refused_early: Callable[..., str], run_directory: Path, frames: Path, arguments: tuple[str, ...]
) -> None:
    save_groups(run_directory, lambda groups: groups["projector"]["projector.2.bias"].__setitem__(7, torch.inf))
    given = () if "--dense" in arguments else ("--calibration", frames)
    message = refused_early(*arguments, *given, run=run_directory)
    assert "projector.projector.2.bias (1 of 64 values, the first, inf, at [7])" in message


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda groups: groups["projector"].pop("projector.2.bias"), "1 missing keys: projector.projector.2.bias"),
        (
            lambda groups: groups["projector"].update({"projector.2.bias": torch.zeros(3)}),
            "projector.projector.2.bias (expected [64], found [3])",
        ),
        (
            lambda groups: groups.update(vla=groups.pop("action_model")),
            "expected the groups vision_backbone, projector",
        ),
    ],
)
def test_compile_refuses_a_checkpoint_of_another_layout(
    refused_early: Callable[..., str], run_directory: Path, edit: Callable[[Groups], object], expected: str
) -> None:
    save_groups(run_directory, edit)
    assert expected in refused_early("--dense", run=run_directory)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("L", "is greyscale (PIL mode 'L'): expected 8-bit RGB"),
        ("RGBA", "take its colours as RGB with --convert"),
        ("CMYK", "has PIL mode 'CMYK': expected 8-bit RGB; save it as an RGB PNG or JPEG"),
        ("I;16", "16 bits a channel: expected 8"),
    ],
)
def test_run_refuses_an_image_that_is_not_8_bit_rgb(artifact: Path, tmp_path: Path, mode: str, message: str) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / "frame.tiff")
    outcome = evla("run", artifact, "--image", tmp_path / "frame.tiff", "--instruction", "go", "--unnorm-key", KEY)
    assert message in refused(outcome)


@pytest.mark.parametrize(
    "damage",
    [
        lambda png: b"",
        lambda png: b"P6\n0 0\n255\n",  # a portable pixmap of zero pixels
        lambda png: png[:5000],
        lambda png: bytes(4).join(png.rsplit(b"IDAT", 1)),  # a chunk without a name
    ],
)
def test_run_refuses_an_image_that_cannot_be_read(
    artifact: Path, photo: Path, damage: Callable[[bytes], bytes]
) -> None:
    photo.write_bytes(damage(photo.read_bytes()))
    message = refused(evla("run", artifact, "--image", photo, "--instruction", "go", "--unnorm-key", KEY))
    assert f"image {photo} cannot be read" in message


def test_run_refuses_a_missing_image(artifact: Path, tmp_path: Path) -> None:
    message = refused(evla("run", artifact, "--image", tmp_path / "none.png", "--instruction", "go"))
    assert "No such file or directory" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--instruction", " ", "--unnorm-key", KEY), "expected a text such as 'pick coke can'"),
        (("--instruction", LONG, "--unnorm-key", KEY), "compile with text_tokens="),
        (("--instruction", "go"), "unnorm_key is missing: expected one of bridge_orig, fractal20220817_data"),
        (("--instruction", "go", "--unnorm-key", "x"), "'x': expected one of bridge_orig, fractal20220817_data"),
        (("--instruction", "go", "--unnorm-key", KEY, "--seed", "-1"), "seed=-1: expected a whole number from 0 up"),
    ],
)
def test_run_refuses_arguments(artifact: Path, photo: Path, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refused(evla("run", artifact, "--image", photo, *arguments))


def test_run_refuses_a_provider_that_is_not_there(artifact: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    outcome = evla("run", artifact, "--image", photo, "--instruction", "go", "--provider", "cuda")
    assert "provider='cuda': expected CUDAExecutionProvider" in refused(outcome)


def test_run_and_verify_refuse_a_file_that_is_not_what_its_manifest_says(spoiled: Path, photo: Path) -> None:
    for arguments in (("run", spoiled, "--image", photo, "--instruction", "go"), ("verify", spoiled)):
        assert "tokenizer.json has the SHA-256" in refused(evla(*arguments))


def test_a_folder_without_an_artifact_is_refused(photo: Path) -> None:
    folder = photo.parent
    for arguments in (("run", folder, "--image", photo, "--instruction", "go"), ("verify", folder)):
        assert "is no compiled policy: expected its manifest at" in refused(evla(*arguments))
    assert "expected exactly one checkpoints/*.pt, found 0" in refused(evla("inspect", folder))
    (folder / "manifest.json").write_text("{}")
    assert "'format' is missing" in refused(evla("inspect", folder))


def test_demo_refuses_a_folder_that_exists_or_has_no_parent(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "none" / "out"):
        assert f"--out {out}: expected a folder that does not exist yet" in refused(evla("demo", "--out", out))
    assert not list(tmp_path.iterdir())


def test_messages_keep_paths_in_one_piece(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 30)
    assert str(path) in evla("verify", path, columns=40).err


def test_messages_show_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def app(**_: str) -> None:
        raise ValueError("expected [bold] [1, 2]")

    monkeypatch.setattr(cli, "app", app)
    assert refused(evla()) == "expected [bold] [1, 2]"


def test_an_error_that_is_not_the_users_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def app(**_: str) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(TypeError, match="a defect"):
        cli.main()


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "list_observations", load)
    assert evla("run", "x", "--image", "y", "--instruction", "z").status == 130


def test_compile_takes_the_plan_of_a_compiled_policy(artifact: Path, tmp_path: Path) -> None:
    plan = read_plan(artifact)
    plan.save(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert len(plan.keep_layers) < 6

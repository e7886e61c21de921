"""The examples run, and the README's and tutorials' snippets do what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from PIL import Image
from typer.main import get_command

from evla_compile.cli import app

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "evla_compile" / "data" / "demo_policy"
PAGES = ("README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*/*.md")))


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, frame: Image.Image) -> Path:
    """A folder with what the README's snippet names: the tiny golden policy as CogACT-Base, and frames."""
    folder = tmp_path_factory.mktemp("snippets")
    (folder / "CogACT-Base").symlink_to(tiny_checkpoint)
    (folder / "frames").mkdir()
    frame.save(folder / "frames" / "0.png")
    frame.save(folder / "frame.png")
    lines = [f'{{"image": "0.png", "instruction": "pick coke can", "episode": {number // 8}}}' for number in range(40)]
    (folder / "frames" / "frames.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_readmes_python_runs_as_it_stands(place: Path) -> None:
    (snippet,) = blocks("README.md", "python")
    before = "import sys\nfrom PIL import Image\n\nimage = Image.open('frame.png')\n"
    after = "assert actions.shape == (16, 7)\n"
    (place / "snippet.py").write_text(before + snippet + after)
    printed = run("snippet.py", cwd=place)
    assert "PruneLayers" in printed
    assert "median" in printed


def test_the_tutorial_on_a_row_counts_it() -> None:
    (snippet,) = blocks("docs/tutorials/reproduce-a-row.md", "python")
    printed = run("-c", snippet)
    assert 0.25 < float(printed.partition("%")[0]) / 100 < 0.30
    assert "4.69 B parameters" in printed


def test_the_examples_compile_and_drive_a_policy(place: Path) -> None:
    printed = run(str(ROOT / "examples" / "compile.py"), "CogACT-Base", "frames", "artifact", cwd=place)
    assert "verified on 2 recorded cases" in printed
    loop = str(ROOT / "examples" / "robot_loop.py")
    options = ["--instruction", "pick coke can", "--unnorm-key", "bridge_orig", "--steps", "3"]
    printed = run(loop, "artifact", "--image", "frame.png", *options, cwd=place)
    assert len(re.findall(r"^[+-]\d", printed, re.MULTILINE)) == 3


def test_the_example_of_a_pass_rewrites() -> None:
    printed = run(str(ROOT / "examples" / "custom_pass.py"))
    assert "ReplaceActivation(path='projector'): 2 changes" in printed
    assert 0.0 < float(printed.rpartition(" ")[2]) < 0.1


def test_the_example_of_an_ablation_prints_a_row_each(place: Path) -> None:
    printed = run(str(ROOT / "examples" / "ablate.py"), "CogACT-Base", "frames", "--rows", "dense", "cache", cwd=place)
    assert re.findall(r"│ (\w+) ", printed) == ["dense", "cache"]


def commands() -> list[tuple[str, str]]:
    lines = [(page, line) for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return [(page, line.partition(" # ")[0]) for page, line in lines if line.startswith("evla ")]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_the_docs_has_only_options_that_exist(page: str, line: str) -> None:
    """Parsed as the command line does, without running anything."""
    name, *arguments = shlex.split(line)[1:]
    command = get_command(app).commands[name]  # type: ignore[attr-defined]  # a group, which click's type does not tell
    with command.make_context(name, arguments, resilient_parsing=False):
        pass


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_is_python(page: str) -> None:
    for block in blocks(page, "python"):
        compile(dedent(block), page, "exec")

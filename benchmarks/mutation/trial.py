"""One trial: the tests of a file, run in a forked process on a copy of the checkout in which one file is changed."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Outcome: TypeAlias = Literal["killed", "timeout", "survived"]

PRELOADED = (
    *("numpy", "onnx", "onnxruntime", "onnxscript", "PIL.Image", "pytest", "rich.progress", "tokenizers", "torch"),
    *("torch._dynamo", "torch._inductor", "torch.onnx", "transformers.models.llama.modeling_llama", "typer"),
)
"""What takes seconds to import; a forked process has it already. Nothing of the project is among it."""

OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning")
"""Of pytest; the warning is of its plugins, some of which the preloaded packages have imported already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What came of a run of tests."""

    outcome: Outcome
    seconds: float
    log: str
    """What pytest printed."""

    @property
    def reason(self) -> str:
        """The test that failed, as pytest names it at the end; empty where none did."""
        named = re.findall(r"^(?:FAILED|ERROR) (\S+\.py.*)$", self.log, re.MULTILINE)
        return str(named[0])[:200] if named else ""


def preload() -> None:
    """Import once what every trial needs."""
    for name in PRELOADED:
        importlib.import_module(name)
    import torch  # noqa: PLC0415 (so that a listing of mutants needs none)

    torch.set_num_threads(1)


def copy_checkout(root: Path, copy: Path) -> None:
    """Make `copy` the files of a checkout that git knows or would take, links as links."""
    shutil.rmtree(copy, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607 (whichever git there is)
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, copy / name, follow_symlinks=False)


@contextmanager
def changed(path: Path, source: str) -> Iterator[None]:
    """Let a file have another content for a while."""
    before, times = path.read_bytes(), path.stat()
    path.write_text(source, encoding="utf-8")
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def run_tests(copy: Path, tests: Sequence[str], limit: float) -> Trial:
    """Run tests of a copied checkout in a forked process, up to the first that fails.

    Raises:
        ValueError: pytest found no tests, or none of that name.
    """
    log, start = copy.parent / "trial.log", time.monotonic()
    child = os.fork()
    if child == 0:
        _run_pytest(copy, tests, log)
    code = _wait(child, limit)
    text = log.read_text(encoding="utf-8", errors="replace")
    if code in (4, 5):
        raise ValueError(f"pytest ran nothing of {', '.join(tests)}:\n{text[-2000:]}")
    outcome: Outcome = "survived" if code == 0 else "timeout" if code is None else "killed"
    return Trial(outcome=outcome, seconds=time.monotonic() - start, log=text)


def _run_pytest(copy: Path, tests: Sequence[str], log: Path) -> None:
    """Run pytest in this process and end it."""
    code = 1
    try:
        os.setsid()
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        sys.dont_write_bytecode = True  # or a file that changes twice in a second would be taken from the cache
        sys.path.insert(0, str(copy))
        for name in [name for name in sys.modules if name.split(".")[0] in ("benchmarks", "evla_compile", "tests")]:
            del sys.modules[name]
        import pytest  # noqa: PLC0415 (see `preload`)

        code = int(pytest.main([*OPTIONS, f"--basetemp={copy.parent / 'temporary'}", *tests]))
    except BaseException:  # noqa: BLE001 (nothing of it may reach the parent's code, of which this process is a copy)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(child: int, limit: float) -> int | None:
    """Return the exit status of a process; None where it ran past `limit` seconds and was ended."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None

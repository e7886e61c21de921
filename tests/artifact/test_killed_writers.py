"""Writers that SIGKILL ends before any of their file operations; see killed_writers.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_writers.py")


@pytest.mark.parametrize(
    ("scenario", "least", "unfinished"),
    [
        ("fresh folder", 15, False),  # a single rename
        ("fresh file", 25, True),
        ("folder again", 40, True),
        ("file again", 40, True),
        ("engine", 25, True),
        ("engine again", 25, True),
        ("file of its own", 8, False),
    ],
)
def test_a_kill_at_any_step_leaves_the_old_or_the_new_files_whole(
    tmp_path: Path, scenario: str, least: int, unfinished: bool
) -> None:
    """Or, while several files move, a place without manifest that the next writer finishes; see the script's checks."""
    done = subprocess.run(
        [sys.executable, SCRIPT, scenario, tmp_path], capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["operations"] >= least
    assert found["old"] > 0
    assert found["new"] > 0
    assert ("unfinished" in found) is unfinished

"""The conditions of a result: the command that measured it, run from the root of a checkout."""

import shlex
import sys
from collections.abc import Sequence


def command_line(module: str, arguments: Sequence[str] | None = None) -> str:
    """Return the command that runs `module`, with this process's own arguments where none are given.

    `sys.argv` alone would name the module by its path on this machine.
    """
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])

"""What each technique saves and how far it moves the actions, one at a time, on a policy and its frames.

    python examples/ablate.py RUN_DIR FRAMES --rows dense layers
    python examples/ablate.py evla_compile/data/demo_policy evla_compile/data/demo_policy/calibration

How far actions move is not how often the task is still done: see docs/results/quality.md.
"""

import argparse
from dataclasses import replace

from rich.console import Console
from rich.table import Table

import evla_compile as evla

DENSE = evla.CompileConfig.dense()
PAPER = evla.CompileConfig.preset("l22-t56")
ROWS = {
    "dense": DENSE,
    "layers": replace(DENSE, keep_layers=PAPER.keep_layers),
    "MLP": replace(DENSE, mlp_keep=PAPER.mlp_keep),
    "tokens": replace(
        DENSE,
        visual_tokens=PAPER.visual_tokens,
        token_rule=PAPER.token_rule,
        merge_tokens=PAPER.merge_tokens,
    ),
    "cache": replace(DENSE, cache_interval=PAPER.cache_interval),
    "all": PAPER,
    "ours": evla.CompileConfig(),
}


def main() -> None:
    """Compile once for each row and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("policy")
    parser.add_argument("frames")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all")
    given = parser.parse_args()

    policy, frames = evla.load(given.policy), evla.read_frames(given.frames)
    table = Table("kept by the paper's share", "GFLOP", "weights MB", "samples moved by")
    for name in given.rows:
        report = evla.compile(policy, ROWS[name], calibration=frames, progress=False).report
        size = report.passes[-1].after
        (samples,) = [found.relative for found in report.deviations if found.stage == "samples"]
        table.add_row(name, f"{size.flops / 1e9:.2f}", f"{size.weight_bytes / 1e6:.1f}", f"{samples:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()

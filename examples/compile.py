"""Compile a policy on recorded frames, export it, and check that the file computes what the graph computes.

python examples/compile.py RUN_DIR FRAMES OUT
python examples/compile.py evla_compile/data/demo_policy evla_compile/data/demo_policy/calibration build/example
"""

import argparse
from pathlib import Path

import evla_compile as evla


def main() -> None:
    """Compile, export, verify."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("policy", help="run directory, a .pt in it, or a Hugging Face id")
    parser.add_argument("frames", help="folder with a frames.jsonl")
    parser.add_argument("out", type=Path, help="folder for the artifact")
    given = parser.parse_args()

    policy = evla.load(given.policy)
    frames = evla.read_frames(given.frames)
    compiled = evla.compile(policy, calibration=frames)
    print(compiled.report)

    compiled.export(given.out)
    verification = evla.verify(given.out)
    stage, error = max(verification.stages, key=lambda found: found[1])
    print(
        f"verified on {verification.cases} recorded cases; largest error {error:.1e} of the largest value, in {stage}"
    )


if __name__ == "__main__":
    main()

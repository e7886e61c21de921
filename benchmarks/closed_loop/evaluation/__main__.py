"""Runs `benchmarks.closed_loop.evaluation.evaluate`."""

import sys

from benchmarks.closed_loop.evaluation.evaluate import main

if __name__ == "__main__":  # not in the processes that it spawns
    sys.exit(main())

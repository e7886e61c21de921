"""Runs `benchmarks.paper.tables`."""

import sys

from benchmarks.paper.tables import main

if __name__ == "__main__":  # not in the processes that it spawns
    sys.exit(main())

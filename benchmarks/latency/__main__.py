"""Runs `benchmarks.latency.compare`."""

from benchmarks.latency.compare import main

if __name__ == "__main__":
    main()

"""What an interrupted calibration goes on from: a folder with the streams behind the last finished layer.

Files are written before `state.json` names them, and removed after it no longer does, so whenever the process ends, the
folder is whole.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from evla_compile.calibration.streams import Batch, Shelf, Stream
from evla_compile.graph.walk import GraphWalk, Values
from evla_compile.json_text import to_json_text
from evla_compile.scratch import replacing

_STATE = "state.json"


class Resumption:
    """Records how far each step of a calibration is; with a shelf in memory, nothing."""

    def __init__(self, shelf: Shelf, key: str) -> None:
        """Take up what an earlier run left.

        Args:
            shelf: where streams are kept.
            key: digest of all that decides what is calculated; what was left under another one is removed.
        """
        self._shelf, self._key = shelf, key
        self._steps: dict[str, Any] = {}
        self._entries: dict[str, list[str]] = {}
        if shelf.folder is None:
            return
        self._read()
        shelf.protect(self._named())

    def reached(self, step: str) -> Mapping[str, Any] | None:
        """Return what was recorded of a step, None where it has to begin."""
        return self._steps.get(step)

    def record(self, step: str, state: Mapping[str, Any], entries: Iterable[str]) -> None:
        """Record how far a step is.

        Args:
            step: its name.
            state: JSON-ready values.
            entries: what the shelf must keep for it, in place of what it kept before.
        """
        if self._shelf.folder is None:
            return
        self._steps[step], self._entries[step] = dict(state), sorted(entries)
        with replacing(self._shelf.folder / _STATE) as new:
            text = to_json_text({"key": self._key, "steps": self._steps, "entries": self._entries})
            new.write_text(text, encoding="utf-8")
        self._shelf.protect(self._named())

    def stream(self, walk: GraphWalk, batches: Sequence[Batch], name: str) -> Stream | None:
        """Return a stream as far as it was recorded, None where it has to begin."""
        reached = self.reached(name)
        return None if reached is None else Stream(walk, batches, self._shelf, name, reached["done"])

    def measures(self, stream: str) -> Values | None:
        """Return what was measured along a stream, as far as it was recorded."""
        reached = self.reached(stream)
        return None if reached is None else self._shelf.read(reached["measures"], torch.device("cpu"))

    def record_stream(self, stream: Stream, measures: Callable[[], Values]) -> None:
        """Record how far a stream is, and what was measured along it."""
        if self._shelf.folder is None:
            return
        name = f"measures-{stream.name}-{stream.done}"
        self._shelf.write(name, measures())
        self.record(stream.name, {"done": stream.done, "measures": name}, {*stream.entries, name})

    def finish(self) -> None:
        """Remove everything: the calibration is done."""
        if self._shelf.folder is not None:
            (self._shelf.folder / _STATE).unlink(missing_ok=True)
            self._shelf.protect(frozenset())

    def _read(self) -> None:
        """Read what an earlier run left, if it is of the same calibration and whole."""
        file = self._shelf.folder / _STATE if self._shelf.folder is not None else None
        if file is None or not file.exists():
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            key, steps, entries = (found[name] for name in ("key", "steps", "entries"))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return  # not ours, or cut short: begin anew
        if key == self._key and all(self._shelf.holds(name) for names in entries.values() for name in names):
            self._steps, self._entries = steps, entries

    def _named(self) -> frozenset[str]:
        return frozenset(name for names in self._entries.values() for name in names)

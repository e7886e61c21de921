"""Streams: the values of a graph on all calibration frames between two of its stretches, in memory or in files."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.walk import GraphWalk, Values, Watch
from evla_compile.host.frames import Frame
from evla_compile.memory import available_memory
from evla_compile.settings.anatomy import IMAGE, INPUT_IDS, TEXT_LENGTH

BATCH = 8
"""Frames of a batch, at most; only frames whose prompts have as many tokens share one."""

_MEMORY_SHARE = 0.5  # of what is free, for streams; beyond that they go to files


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Observations whose prompts have equally many tokens, so that none is padded."""

    places: tuple[int, ...]
    """Place of each among the frames."""
    image: Tensor
    """Squashed frames, uint8 [B,S,S,3]."""
    input_ids: Tensor
    """Token ids, int64 [B,T]."""

    @property
    def inputs(self) -> Values:
        """The inputs of the captured graph up to the cognition feature, by name."""
        size, length = self.input_ids.shape
        lengths = torch.full((size,), length, device=self.input_ids.device)
        return {IMAGE: self.image, INPUT_IDS: self.input_ids, TEXT_LENGTH: lengths}


def batches_of(policy: CogACT, frames: Sequence[Frame]) -> tuple[Batch, ...]:
    """Return all frames in batches, on the device of the policy.

    Raises:
        ValueError: a frame or an instruction is refused by the processor.
    """
    device = next(policy.parameters()).device
    prompts = [policy.processor.prompt_ids(frame.instruction) for frame in frames]
    by_length: dict[int, list[int]] = {}
    for place, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(place)
    groups = [
        places[first : first + BATCH]
        for _, places in sorted(by_length.items())
        for first in range(0, len(places), BATCH)
    ]
    return tuple(
        Batch(
            places=tuple(group),
            image=torch.from_numpy(np.stack([policy.processor.image(frames[place].image) for place in group])).to(
                device
            ),
            input_ids=torch.tensor([prompts[place] for place in group], device=device),
        )
        for group in groups
    )


class Shelf:
    """Where streams and solved weights are kept: in memory, or in files of a folder.

    Attributes:
        folder: the folder; None for memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._held: dict[str, Values] = {}
        self._kept: frozenset[str] = frozenset()

    def write(self, name: str, values: Values) -> None:
        """Keep values under a name."""
        if self.folder is None:
            self._held[name] = values
            return
        tensors = {f"size.{key}": torch.tensor(v) for key, v in values.items() if not isinstance(v, Tensor)}
        tensors |= {f"value.{key}": v.contiguous() for key, v in values.items() if isinstance(v, Tensor)}
        new = self._file(name).with_suffix(".new")
        save_file(tensors, new)
        new.replace(self._file(name))  # values that were read may still be mapped from the file before

    def read(self, name: str, device: torch.device) -> Values:
        """Return the values kept under a name."""
        if self.folder is None:
            return self._held[name]
        values: Values = {}
        for key, tensor in load_file(self._file(name), device=str(device)).items():
            kind, _, node = key.partition(".")
            values[node] = tensor if kind == "value" else int(tensor)
        return values

    def holds(self, name: str) -> bool:
        """Tell whether something is kept under a name."""
        return name in self._held if self.folder is None else self._file(name).is_file()

    def drop(self, name: str) -> None:
        """Forget what is kept under a name, unless `protect` named it."""
        if self.folder is None:
            self._held.pop(name, None)
        elif name not in self._kept:
            self._file(name).unlink(missing_ok=True)

    def protect(self, names: frozenset[str]) -> None:
        """Keep files of these names, and remove all others: they are what an interrupted calibration goes on from."""
        self._kept = names
        if self.folder is not None:
            for file in self.folder.glob("*.safetensors"):
                if file.stem not in names:
                    file.unlink()

    def _file(self, name: str) -> Path:
        if self.folder is None:
            raise AssertionError("values in memory have no file")
        return self.folder / f"{name}.safetensors"


@contextmanager
def open_shelf(scratch: str | os.PathLike[str] | None, needed: int) -> Iterator[Shelf]:
    """Yield where streams are kept: in the folder that is given, in a temporary one if they are large, or in memory.

    Args:
        scratch: the folder, made if missing; None for one of the other two.
        needed: bytes that they take.
    """
    free = available_memory()
    if scratch is not None:
        folder = Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        yield Shelf(folder)
    elif free is not None and needed > _MEMORY_SHARE * free:
        with TemporaryDirectory(prefix="evla-calibration-") as temporary:
            yield Shelf(Path(temporary))
    else:
        yield Shelf()


class Stream:
    """A graph's run over all batches, as far as it has come.

    Attributes:
        walk: the graph.
        batches: the batches.
        name: what its values are kept under.
        done: stretches that have run.
    """

    def __init__(self, walk: GraphWalk, batches: Sequence[Batch], shelf: Shelf, name: str, done: int = 0) -> None:
        self.walk, self.batches, self.name, self.done = walk, batches, name, done
        self._shelf = shelf

    @classmethod
    def start(cls, walk: GraphWalk, batches: Sequence[Batch], shelf: Shelf, name: str) -> Self:
        """Return the stream in front of a graph's first stretch."""
        stream = cls(walk, batches, shelf, name)
        for number, batch in enumerate(batches):
            stream.put(number, batch.inputs)
        return stream

    @property
    def entries(self) -> frozenset[str]:
        """Names of its values on the shelf."""
        return frozenset(self._entry(number) for number in range(len(self.batches)))

    def values(self, number: int) -> Values:
        """Return the values on a batch."""
        return self._shelf.read(self._entry(number), self.batches[number].image.device)

    def put(self, number: int, values: Values) -> None:
        """Replace the values on a batch."""
        self._shelf.write(self._entry(number), values)

    def __iter__(self) -> Iterator[tuple[Batch, Values]]:
        """Yield every batch with its values."""
        for number, batch in enumerate(self.batches):
            yield batch, self.values(number)

    def fork(self, name: str) -> "Stream":
        """Return another stream from here."""
        forked = Stream(self.walk, self.batches, self._shelf, name, self.done)
        for number in range(len(self.batches)):
            forked.put(number, self.values(number))
        return forked

    def thinned(self, name: str, frames: int) -> "Stream":
        """Return a stream of some of the batches, evenly spread, with about so many frames where there are more."""
        total = sum(len(batch.places) for batch in self.batches)
        chosen = range(0, len(self.batches), max(1, total // frames))
        stream = Stream(self.walk, [self.batches[number] for number in chosen], self._shelf, name, self.done)
        for place, number in enumerate(chosen):
            stream.put(place, self.values(number))
        return stream

    def onto(self, walk: GraphWalk, stop: fx.Node, name: str) -> "Stream":
        """Return a stream of another graph, which computes the same up to a node that its walk is divided at."""
        stream = Stream(walk, self.batches, self._shelf, name, walk.count_to(stop))
        live = [node.name for node in walk.live(stop)]
        for number, (batch, values) in enumerate(self):
            known = {**batch.inputs, **values}
            stream.put(number, {name: known[name] for name in live})
        return stream

    def jump(self, stop: fx.Node, values: Callable[[Values], Values]) -> None:
        """Go on behind a node with values that were computed elsewhere.

        Args:
            stop: a node that the walk is divided at.
            values: takes the values on a batch, and returns those that are needed behind the node and differ.
        """
        before, live = self.entries, [node.name for node in self.walk.live(stop)]
        found = [(values(here), here) for here in map(self.values, range(len(self.batches)))]
        self.done = self.walk.count_to(stop)
        for number, (new, here) in enumerate(found):
            self.put(number, {name: new[name] if name in new else here[name] for name in live})
        self._drop(before - self.entries)

    def advance(
        self,
        stop: fx.Node,
        watch: Callable[[Batch], Watch] | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Run all batches up to a node, stretch by stretch.

        Args:
            stop: a node that the walk is divided at.
            watch: gives what is called with the values of nodes on a batch.
            tick: called behind every stretch.
        """
        while self.done < self.walk.count_to(stop):
            before, stretch = self.entries, self.done
            with self.walk.loaded(stretch), torch.no_grad():
                for number, batch in enumerate(self.batches):
                    watched = watch(batch) if watch else None
                    values = self.walk.run_stretch(stretch, self.values(number), len(batch.places), watched)
                    self._shelf.write(self._entry(number, stretch + 1), values)
            self.done += 1
            self._drop(before)
            tick()

    def close(self) -> None:
        """Forget the values."""
        self._drop(self.entries)

    def _drop(self, entries: frozenset[str]) -> None:
        for entry in entries:
            self._shelf.drop(entry)

    def _entry(self, number: int, done: int | None = None) -> str:
        return f"{self.name}-{self.done if done is None else done}-{number}"


def in_frame_order(batches: Sequence[Batch], features: Sequence[Tensor]) -> Tensor:
    """Return features [B,1,D] or [B,D] of batches as those of every frame in turn, float32 [F,D]."""
    found: dict[int, Tensor] = {}
    for batch, values in zip(batches, features, strict=True):
        found |= zip(batch.places, values.flatten(1).float(), strict=True)
    return torch.stack([found[place] for place in sorted(found)])

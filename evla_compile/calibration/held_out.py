"""Which calibration frames a repair is fitted on, and which are held out to decide about it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from evla_compile.errors import CalibrationError
from evla_compile.host.frames import Frame

EVERY = 5
"""One episode of so many is held out, of each instruction."""

BLOCK = 8
"""Consecutive frames that count as an episode where the frames name none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Two parts of the frames, by their places."""

    fitted: frozenset[int]
    """Frames that are fitted on."""
    held_out: frozenset[int]
    """Frames that decide."""
    warnings: tuple[str, ...]
    """Instructions of which there is too little in a part."""


def split_frames(frames: Sequence[Frame], needed: int) -> Split:
    """Split frames by episode, or by blocks of consecutive frames of one instruction where no episode is named.

    Of every instruction's episodes, in the order in which they appear, each fifth is held out; of fewer than five the
    last one, and of a single one none.

    Args:
        frames: all calibration frames.
        needed: frames for each instruction, on average.

    Raises:
        CalibrationError: there are fewer, or no frame could be held out; the message says how many are needed.
    """
    counts = Counter(frame.instruction for frame in frames)
    if len(frames) < needed * len(counts):
        raise CalibrationError(
            f"a repair needs about {needed} calibration frames for each instruction, {needed * len(counts)} in all,"
            f" since a fit on fewer can do harm, and these are {len(frames)}: give more frames, allow fewer with"
            " repair_frames (--repair-frames), or repair nothing (--repair none)"
        )
    episodes: dict[str, dict[str, list[int]]] = {instruction: {} for instruction in counts}
    for place, episode in enumerate(_episodes(frames)):
        episodes[frames[place].instruction].setdefault(episode, []).append(place)
    held: set[int] = set()
    for found in episodes.values():
        chosen = list(found.values())[EVERY - 1 :: EVERY] or list(found.values())[1:][-1:]
        held.update(place for places in chosen for place in places)
    if not held:
        raise CalibrationError(
            f"the {len(frames)} calibration frames are of one episode for each instruction: a repair is fitted on some"
            " episodes and judged on others, so give frames of two episodes of an instruction or more (five are better)"
        )
    return Split(
        fitted=frozenset(range(len(frames))) - held,
        held_out=frozenset(held),
        warnings=_warnings(frames, held, needed),
    )


def _episodes(frames: Sequence[Frame]) -> list[str]:
    """Return an episode for every frame: the one it names, or the block of frames that it stands in."""
    found: list[str] = []
    run = 0
    for place, frame in enumerate(frames):
        run = 0 if place and frame.instruction != frames[place - 1].instruction else run
        if frame.episode is None and not run % BLOCK:
            block = place
        found.append(f"block {block}" if frame.episode is None else f"episode {frame.episode}")
        run += 1
    return found


def _warnings(frames: Sequence[Frame], held: set[int], needed: int) -> tuple[str, ...]:
    fitted = Counter(frame.instruction for place, frame in enumerate(frames) if place not in held)
    judged = Counter(frames[place].instruction for place in held)
    found = []
    for instruction in sorted(fitted | judged):
        count = fitted[instruction] + judged[instruction]
        if count < needed:
            found.append(f"{instruction!r}: {count} frames, fewer than {needed}; the repair may do harm to this task")
        elif not judged[instruction]:
            found.append(f"{instruction!r}: one episode, so nothing tells what the repair does to this task")
    return tuple(found)

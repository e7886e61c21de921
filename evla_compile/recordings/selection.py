"""Which frames of a recording are taken; no torch."""

import re
from dataclasses import dataclass

from evla_compile.arguments import is_listed, is_whole, lone_surrogate, whole_number

MOST_EPISODES = 1_000_000
"""Episodes of the largest recording that is read."""

_SPAN = re.compile(r"\s*(\d{1,7})\s*(?:-\s*(\d{1,7})\s*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which frames of a recording are taken, and the instruction that they get."""

    camera: str | None = None
    """Image feature of a dataset, or image topic of a bag; None where there is just one."""
    every: int = 1
    """Take one frame of this many, from the first frame of each episode on."""
    episodes: tuple[int, ...] | None = None
    """Indices of the episodes; None for all."""
    instruction: str | None = None
    """The task in words for all frames, in place of what was recorded; None for what was recorded."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: a field has a wrong type or is out of its range.
        """
        whole_number("every", self.every, low=1)
        for name, example in (("camera", "/camera/image_raw"), ("instruction", "pick coke can")):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text.strip() or lone_surrogate(text)):
                raise ValueError(f"{name}={text!r:.80}: expected a text such as {example!r}, in whole characters")
        if self.episodes is None:
            return
        if not is_listed(self.episodes) or not self.episodes or not all(map(is_whole, self.episodes)):
            raise ValueError(f"episodes={self.episodes!r:.80}: expected indices such as (0, 1, 2), or None for all")
        for index in self.episodes:
            whole_number("episodes", index, low=0, high=MOST_EPISODES - 1)


def parse_episodes(text: str) -> tuple[int, ...]:
    """Return the indices that a text such as `0-4,7` names, in ascending order.

    Raises:
        ValueError: the text is malformed.
    """
    indices: set[int] = set()
    for part in text.split(","):
        span = _SPAN.fullmatch(part)
        first, last = (0, -1) if span is None else (int(span[1]), int(span[2] or span[1]))
        if last < first or last >= MOST_EPISODES:
            raise ValueError(f"episodes {text!r:.80}: expected indices and spans that ascend, as in 0-4,7")
        indices.update(range(first, last + 1))
    return tuple(sorted(indices))

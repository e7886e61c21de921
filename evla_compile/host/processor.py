"""Pre- and post-processing: frame to pixels, instruction to token ids, raw samples to robot actions; no torch.

Shape legend: H, W frame size in pixels, S image side, T text budget, A action steps.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from evla_compile.arguments import is_listed, lone_surrogate, whole_number
from evla_compile.errors import CheckpointError
from evla_compile.host.camera_frame import CameraFrame, Framing, fit
from evla_compile.settings.sizes import ACTION_WIDTH

GRIPPER = 6
"""Index of the gripper in an action."""
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
"""The prompt that CogACT was trained with."""
BOS_ID = 1
"""Id that starts every prompt."""
BLANK_ID = 29871
"""Id of Llama-2's word-boundary piece alone, appended to every prompt in front of the end token, as in training."""
EOS_ID = 2
"""Id appended last; the hidden state at its position conditions the action head (the cognition token)."""
WORD_BOUNDARY = "\u2581"
"""The piece that marks the start of a word."""
PAD_ID = 32000
"""Id that fills a prompt up to the text budget: CogACT's extra row behind Llama-2's vocabulary."""

_WHOLE_ACTION = (True,) * ACTION_WIDTH
_REFUSED_MARKERS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionStatistics:
    """The range onto which one dataset's normalised actions are mapped.

    Lists and arrays are converted to tuples.

    Raises:
        ValueError: a field has not 7 values of its type, a low exceeds its high, or the span between them is infinite.
    """

    low: tuple[float, ...]
    """The 1st percentile of each of the 7 action numbers (`q01`), the image of -1."""
    high: tuple[float, ...]
    """The 99th percentile of each of the 7 action numbers (`q99`), the image of +1."""
    mask: tuple[bool, ...] = _WHOLE_ACTION
    """Which of the 7 action numbers are mapped at all; the published datasets leave the gripper as it is."""

    def __post_init__(self) -> None:
        for field in ("low", "high", "mask"):
            object.__setattr__(self, field, _plain(getattr(self, field)))
        for name, values in (("low (q01)", self.low), ("high (q99)", self.high)):
            if not _is_vector(values) or not all(_is_finite(value) for value in values):
                raise ValueError(f"{name}={values!r}: expected {ACTION_WIDTH} finite numbers")
        if not _is_vector(self.mask) or not all(isinstance(value, bool) for value in self.mask):
            raise ValueError(f"mask={self.mask!r}: expected {ACTION_WIDTH} booleans")
        if any(low > high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"low (q01)={self.low!r} exceeds high (q99)={self.high!r} somewhere")
        for index, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if not math.isfinite(float(high) - float(low)):
                raise ValueError(
                    f"action number {index} spans from low (q01)={low!r} to high (q99)={high!r}, more than a float64"
                    " holds: actions would be infinite; expected the percentiles of recorded actions"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the dataset's entry in the form of dataset_statistics.json, as far as it is used."""
        return {"action": {"q01": list(self.low), "q99": list(self.high), "mask": list(self.mask)}}


def read_statistics(data: Mapping[str, Any]) -> dict[str, ActionStatistics]:
    """Return the action statistics by dataset name (the `unnorm_key`) out of the contents of dataset_statistics.json.

    Raises:
        CheckpointError: an entry is missing or malformed; the message names the dataset and the key.
    """
    if not isinstance(data, Mapping) or not data:
        raise CheckpointError(f"dataset statistics: expected a JSON object with a key per dataset, found {data!r:.60}")
    return {dataset: _read_dataset(dataset, entry) for dataset, entry in data.items()}


class Processor:
    """Prepares the inputs of the graph and turns its samples into actions, exactly as CogACT does.

    Attributes:
        tokenizer_json: contents of Llama-2's tokenizer.json.
        statistics: action statistics by dataset name.
        image_side: side in pixels of the square image that the vision towers take.
        pad_id: token id that fills a prompt up to its budget; any row of the embedding.
        vocabulary: pieces of the tokenizer, special ones included.
        largest_id: the largest token id of a prompt; the embedding must have a row for it.
        blank_id: the tokenizer's id of the word-boundary piece alone, which precedes the end token.
    """

    def __init__(
        self,
        *,
        tokenizer_json: str,
        statistics: Mapping[str, ActionStatistics],
        image_side: int,
        pad_id: int = PAD_ID,
    ) -> None:
        """Parse the tokenizer; the arguments become the attributes.

        Raises:
            CheckpointError: the tokenizer cannot be parsed, or its ids of start and end are not Llama-2's.
            ValueError: `image_side` or `pad_id` is out of range.
        """
        self.tokenizer_json = tokenizer_json
        self.statistics = dict(statistics)
        self.image_side = whole_number("image_side", image_side, low=1, of="pixels")
        self.pad_id = whole_number("pad_id", pad_id, low=0)
        self._tokenizer = _read_tokenizer(tokenizer_json)
        self.vocabulary = self._tokenizer.get_vocab_size()
        blank = self._tokenizer.token_to_id(WORD_BOUNDARY)
        self.blank_id = BLANK_ID if blank is None else blank
        # Ids may have gaps, so the largest one does not follow from the number of pieces.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.largest_id = max(self.blank_id, EOS_ID, BOS_ID, *ids)

    def image(self, image: CameraFrame, framing: Framing = "whole") -> NDArray[np.uint8]:
        """Return a frame of any size as the policy's square image, uint8 [S,S,3].

        Args:
            image: PIL image of mode RGB, or uint8 [H,W,3] in RGB order; an orientation in its EXIF data is applied.
            framing: "whole" squashes it with PIL's bicubic filter, its aspect ratio lost; "deploy" cuts it first as
                CogACT's server for real robots does; see `evla_compile.host.camera_frame.Framing`.

        Raises:
            ValueError: the image is not 8-bit RGB or has no pixels, or the framing is unknown.
        """
        return fit(image, self.image_side, framing)

    def prompt_ids(self, instruction: str) -> list[int]:
        """Return the token ids of the prompt, BOS first, the word-boundary and EOS ids last.

        The instruction is lower-cased and otherwise unchanged, spaces around it included, as in training.

        Raises:
            ValueError: the instruction is no text, is empty, or contains a special token or a lone surrogate.
        """
        given: object = instruction
        if not isinstance(given, str) or not given.strip():
            remedy = "; decode bytes, as in instruction.decode('utf-8')" if isinstance(given, bytes) else ""
            raise ValueError(f"instruction={instruction!r}: expected a text such as 'pick coke can'{remedy}")
        half = lone_surrogate(instruction)
        if half is not None:
            raise ValueError(
                f"instruction={instruction!r} holds {half!r}, half of a character (a lone surrogate), which no"
                " tokenizer can read: decode the text as what it was encoded in"
            )
        text = instruction.lower()
        for marker in _REFUSED_MARKERS:
            if marker in text:
                raise ValueError(
                    f"instruction={instruction!r} contains {marker!r}, which a prompt reserves for itself; remove it"
                )
        return [*self._tokenizer.encode(PROMPT.format(instruction=text)).ids, self.blank_id, EOS_ID]

    def text(self, instruction: str, budget: int) -> tuple[NDArray[np.int64], int]:
        """Return the prompt's ids right-padded to int64 [T], and how many of them are real.

        Args:
            instruction: the task in a few words.
            budget: T, the `text_tokens` for which the policy is compiled.

        Raises:
            ValueError: the instruction is refused by `prompt_ids`, its prompt exceeds the budget, or the budget is no
                whole number.
        """
        budget = whole_number("budget", budget, low=1)
        ids = self.prompt_ids(instruction)
        if len(ids) > budget:
            raise ValueError(
                f"the prompt of instruction={instruction!r} has {len(ids)} tokens, its budget is {budget}:"
                f" shorten the instruction or compile with text_tokens={len(ids)} or more"
            )
        padded = np.full(budget, self.pad_id, dtype=np.int64)
        padded[: len(ids)] = ids
        return padded, len(ids)

    def statistics_for(self, unnorm_key: str | None) -> ActionStatistics:
        """Return the statistics of a dataset; None for the only one.

        Raises:
            ValueError: the dataset is unknown or no text, or None was given and there are several; the message lists
                the known.
        """
        known = ", ".join(sorted(self.statistics))
        if unnorm_key is None:
            if len(self.statistics) != 1:
                raise ValueError(f"unnorm_key is missing: expected one of {known}")
            (unnorm_key,) = self.statistics
        if not isinstance(unnorm_key, str):
            raise ValueError(f"unnorm_key={unnorm_key!r:.80}: expected one dataset for the whole batch, one of {known}")
        if unnorm_key not in self.statistics:
            raise ValueError(f"unknown unnorm_key {unnorm_key!r}: expected one of {known}")
        return self.statistics[unnorm_key]

    def actions(self, samples: ArrayLike, unnorm_key: str | None = None) -> NDArray[np.float64]:
        """Turn raw samples [...,A,7] into actions float64 [...,A,7] in the units of a dataset.

        Samples are clipped to [-1,1] and the gripper is set to 0 (closed) below 0.5, else to 1 (open); then the numbers
        in the dataset's mask are mapped linearly from [-1,1] onto [low,high].

        Args:
            samples: what the sampler returned; left unchanged.
            unnorm_key: name of the dataset; None where only one is known.

        Raises:
            ValueError: the dataset is unknown, the shape is another, or a sample or an action is not finite.
        """
        return scale_actions(samples, self.statistics_for(unnorm_key))


def scale_actions(samples: ArrayLike, statistics: ActionStatistics) -> NDArray[np.float64]:
    """Turn raw samples [...,A,7] into actions float64 [...,A,7]; see `Processor.actions`.

    Raises:
        ValueError: the shape is another, or a sample or an action is not finite.
    """
    raw = np.asarray(samples, dtype=np.float64)
    if raw.ndim < 2 or raw.shape[-1] != ACTION_WIDTH:
        raise ValueError(f"samples have the shape {raw.shape}: expected [...,A,{ACTION_WIDTH}]")
    if not np.isfinite(raw).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(raw))} of {raw.size} samples are not finite, and a robot must not move"
            " on them: check the weights and their dtype with verify"
        )
    normalized = np.clip(raw, -1.0, 1.0)
    normalized[..., GRIPPER] = normalized[..., GRIPPER] >= 0.5
    low = np.array(statistics.low, dtype=np.float64)
    high = np.array(statistics.high, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused next
        actions = np.where(statistics.mask, 0.5 * (normalized + 1.0) * (high - low) + low, normalized)
    if not np.isfinite(actions).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(actions))} of {actions.size} actions are not finite after scaling, and"
            f" a robot must not move on them: check the statistics of the dataset, {statistics}"
        )
    return actions


def _plain(values: Any) -> Any:
    """Return a list or array of numbers or booleans as a tuple of Python values; anything else unchanged."""
    if not is_listed(values):
        return values
    return tuple(value.item() if isinstance(value, np.generic) else value for value in values)


def _is_vector(values: object) -> bool:
    return isinstance(values, tuple) and len(values) == ACTION_WIDTH


def _is_finite(value: object) -> bool:
    # Compared, not tested with isfinite: JSON's integers may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _read_dataset(dataset: str, entry: object) -> ActionStatistics:
    action = entry.get("action") if isinstance(entry, Mapping) else None
    if not isinstance(action, Mapping):
        raise CheckpointError(f"dataset statistics of {dataset!r}: expected an object under the key 'action'")
    rows: list[Any] = [action.get("q01"), action.get("q99"), action.get("mask", _WHOLE_ACTION)]
    low, high, mask = (tuple(row) if isinstance(row, list) else row for row in rows)
    try:
        return ActionStatistics(low=low, high=high, mask=mask)
    except ValueError as error:
        raise CheckpointError(f"dataset statistics of {dataset!r}, key 'action': {error}") from error


def _read_tokenizer(text: str) -> Tokenizer:
    advice = "give Llama-2's tokenizer.json, as in openvla/openvla-7b"
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"the tokenizer cannot be parsed ({error}): {advice}") from error
    # A file may have truncation and padding switched on; the budget is enforced by `Processor.text` instead.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    start = tokenizer.encode("").ids[:1]
    if start != [BOS_ID]:
        raise CheckpointError(f"the tokenizer starts a text with the ids {start}, not with BOS {BOS_ID}: {advice}")
    end = tokenizer.token_to_id("</s>")
    if end not in (None, EOS_ID):
        raise CheckpointError(f"the tokenizer gives '</s>' the id {end}, not {EOS_ID}: {advice}")
    return tokenizer

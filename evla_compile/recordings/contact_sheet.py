"""Draw a contact sheet: many camera frames in a grid, with episode and instruction below each; no torch."""

from collections.abc import Sequence
from math import ceil

from PIL import Image, ImageDraw, ImageFont

from evla_compile.host.camera_frame import rgb_image
from evla_compile.host.frames import Frame
from evla_compile.host.picture import wrapped
from evla_compile.terminal import in_one_line

MOST_FRAMES = 64
"""Frames of the largest sheet."""
COLUMNS = 8
"""Frames in a full row."""
CELL = (176, 184)
"""Width and height of a frame with its caption, in pixels."""

_MARGIN, _LINE, _CAPTION_LINES = 8, 14, 3
_PICTURE = (CELL[0] - _MARGIN, CELL[1] - 2 * _MARGIN - _CAPTION_LINES * _LINE)


def evenly_spread(count: int, most: int = MOST_FRAMES) -> list[int]:
    """Return at most `most` of the indices 0 to `count` - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def draw_contact_sheet(frames: Sequence[Frame]) -> Image.Image:
    """Return frames row by row, as a picture of `COLUMNS` frames a row, fewer if there are fewer.

    Args:
        frames: 1 to `MOST_FRAMES` frames.

    Raises:
        ValueError: there are none or too many.
    """
    if not 0 < len(frames) <= MOST_FRAMES:
        raise ValueError(f"{len(frames)} frames: expected 1 to {MOST_FRAMES}")
    columns = min(len(frames), COLUMNS)
    sheet = Image.new("RGB", (columns * CELL[0], ceil(len(frames) / columns) * CELL[1]), "white")
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        sheet.paste(_cell(frame), (column * CELL[0], row * CELL[1]))
    return sheet


def _cell(frame: Frame) -> Image.Image:
    cell = Image.new("RGB", CELL, "white")  # what is too wide is cut off at its edge
    picture = rgb_image(frame.image)
    scale = min(_PICTURE[0] / picture.width, _PICTURE[1] / picture.height)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    cell.paste(picture.resize(size, Image.Resampling.BICUBIC), (_MARGIN // 2, _MARGIN))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(size=11)
    episode = "episode unknown" if frame.episode is None else f"episode {in_one_line(frame.episode)}"
    words = wrapped(in_one_line(frame.instruction), font, _PICTURE[0], _CAPTION_LINES - 1)
    for line, (text, colour) in enumerate([(episode, "grey"), *((text, "black") for text in words)]):
        draw.text((_MARGIN // 2, _MARGIN + _PICTURE[1] + 2 + line * _LINE), text, fill=colour, font=font)
    return cell

"""Show which visual tokens a policy keeps, as a picture of the camera frame or as text for a terminal; no torch."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from evla_compile.host.camera_frame import CameraFrame, rgb_image
from evla_compile.terminal import in_one_line

_DIMMED = 0.25  # brightness of a patch that is dropped
_TINT = np.array((0, 10, 50))  # added to its grey: blue, to tell it from grey or dark pixels of the frame
_FRAME_COLOUR = (255, 200, 0)
_LINE, _MARGIN, _SWATCH = 22, 8, 14  # pixels of the legend
_INSTRUCTION_LINES = 3


def draw_kept_tokens(
    image: CameraFrame, kept: NDArray[np.int64], patches: int, *, instruction: str | None = None, side: int = 448
) -> Image.Image:
    """Return the frame, squashed to a square as the policy sees it, with the patches that were dropped in dark blue.

    Kept patches have the camera's colours and a yellow frame, so a grey patch in a frame is a kept one that shows
    something grey.

    Args:
        image: PIL image of mode RGB or uint8 [H,W,3].
        kept: indices of the kept patches, row by row; see `CompiledPolicy.kept_tokens`.
        patches: all patches, a square number.
        instruction: the task in words; with it, a legend shows the instruction, the count and the colours' meaning.
        side: side of the frame's picture in pixels, rounded down to a multiple of the patches in a row.

    Raises:
        ValueError: `patches` is no square number, or an index is out of range.
    """
    row = _row(kept, patches)
    cell = side // row
    pixels = np.asarray(rgb_image(image).resize((cell * row, cell * row), Image.Resampling.BICUBIC))
    mask = np.kron(_grid(kept, row), np.ones((cell, cell), dtype=bool))
    drawn = np.where(mask[..., None], pixels, _dropped(pixels))
    for index in kept.tolist():
        top, left = cell * (index // row), cell * (index % row)
        for edge in (0, cell - 1):
            drawn[top + edge, left : left + cell] = _FRAME_COLOUR
            drawn[top : top + cell, left + edge] = _FRAME_COLOUR
    picture = Image.fromarray(drawn)
    return picture if instruction is None else _with_legend(picture, len(kept), patches, instruction)


def kept_tokens_text(kept: NDArray[np.int64], patches: int) -> str:
    """Return the patches as lines of two characters each, "##" for those kept and ".." for those dropped.

    Raises:
        ValueError: see `draw_kept_tokens`.
    """
    grid = _grid(kept, _row(kept, patches))
    return "\n".join("".join("##" if cell else ".." for cell in line) for line in grid)


def _row(kept: NDArray[np.int64], patches: int) -> int:
    row = math.isqrt(patches)
    if row * row != patches or row == 0:
        raise ValueError(f"patches={patches}: expected a square number")
    if kept.size and not 0 <= kept.min() <= kept.max() < patches:
        raise ValueError(f"kept={kept.tolist()}: expected indices from 0 to {patches - 1}")
    return row


def _grid(kept: NDArray[np.int64], row: int) -> NDArray[np.bool_]:
    grid = np.zeros(row * row, dtype=bool)
    grid[kept] = True
    return grid.reshape(row, row)


def _dropped(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels [H,W,3] as those of dropped patches: grey, dark and tinted."""
    tinted: NDArray[np.uint8] = (_DIMMED * pixels.mean(axis=-1, keepdims=True) + _TINT).astype(np.uint8)
    return tinted


def _with_legend(picture: Image.Image, count: int, patches: int, instruction: str) -> Image.Image:
    font = ImageFont.load_default(size=13)
    words = wrapped(f'"{in_one_line(instruction)}"', font, picture.width - 2 * _MARGIN)
    rows = (
        (f"{count} of {patches} visual tokens are kept: the camera's colours, grey ones too", _FRAME_COLOUR, "white"),
        (
            f"{patches - count} are dropped: darkened, in blue",
            None,
            tuple(_dropped(np.full((1, 1, 3), 128, np.uint8))[0, 0]),
        ),
    )
    height = 2 * _MARGIN + _LINE * (len(words) + len(rows))
    whole = Image.new("RGB", (picture.width, picture.height + height), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    top = picture.height + _MARGIN
    for line in words:
        draw.text((_MARGIN, top), line, fill="black", font=font)
        top += _LINE
    for text, outline, fill in rows:
        draw.rectangle((_MARGIN, top, _MARGIN + _SWATCH, top + _SWATCH), fill=fill, outline=outline, width=2)
        draw.text((2 * _MARGIN + _SWATCH, top), text, fill="black", font=font)
        top += _LINE
    return whole


def wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int = _INSTRUCTION_LINES
) -> list[str]:
    """Return a text in at most `lines` lines of at most `width` pixels; a long text is cut off at its end.

    A word that is wider than that stays whole.
    """
    found = [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".strip()
        if found[-1] and font.getlength(longer) > width:
            found.append(word)
        else:
            found[-1] = longer
    if len(found) > lines:
        found = [*found[: lines - 1], f"{found[lines - 1]} ..."]
    return found

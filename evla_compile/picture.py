"""Which visual tokens a policy keeps, drawn on the camera frame: as a picture and as text for a terminal; no torch."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evla_compile.camera_frame import CameraFrame, rgb_image

_DIMMED = 0.25  # brightness of a patch that is dropped
_FRAME_COLOUR = (255, 200, 0)


def draw_kept_tokens(image: CameraFrame, kept: NDArray[np.int64], patches: int, *, side: int = 448) -> Image.Image:
    """Return the frame, squashed to a square as the policy sees it, with the patches that were dropped darkened.

    Args:
        image: PIL image of mode RGB or uint8 [H,W,3].
        kept: indices of the kept patches, row by row; see `CompiledPolicy.kept_tokens`.
        patches: all patches, a square number.
        side: side of the picture in pixels, rounded down to a multiple of the patches in a row.

    Raises:
        ValueError: `patches` is no square number, or an index is out of range.
    """
    row = _row(kept, patches)
    cell = side // row
    pixels = np.asarray(rgb_image(image).resize((cell * row, cell * row), Image.Resampling.BICUBIC))
    mask = np.kron(_grid(kept, row), np.ones((cell, cell), dtype=bool))
    drawn = np.where(mask[..., None], pixels, (_DIMMED * pixels).astype(np.uint8))
    for index in kept.tolist():
        top, left = cell * (index // row), cell * (index % row)
        for edge in (0, cell - 1):
            drawn[top + edge, left : left + cell] = _FRAME_COLOUR
            drawn[top : top + cell, left + edge] = _FRAME_COLOUR
    return Image.fromarray(drawn)


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

"""Turn a camera frame into the policy's image: 8-bit RGB, upright, cropped and resized as in training; no torch.

Shape legend: H, W frame size in pixels, S image side.
"""

import math
import os
import struct
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CameraFrame: TypeAlias = Image.Image | NDArray[np.uint8]
"""A PIL image of mode RGB, or uint8 [H,W,3] in RGB order."""

Framing: TypeAlias = Literal["whole", "deploy"]
"""What the policy sees of a camera frame.

"whole" squashes the whole frame to the policy's square, its aspect ratio lost, as CogACT was pretrained and as it is
evaluated in SIMPLER. "deploy" does first what CogACT's own server for real robots does (its `scripts/deploy.py`): it
cuts the largest square out of the middle, resizes it with Lanczos' filter, cuts the middle 90 % of its area out and
resizes that again.

Choose "deploy" for a checkpoint that was fine-tuned on frames cut to a square, with CogACT's random-crop augmentation
(crops of 90 % of the area), and that ran on the robot behind that server: a policy must see in use what it saw in
training. Stay with "whole" for the published checkpoints, and for a fine-tuned one that was trained on whole frames.
"deploy" cuts off everything left and right of the middle square, so make sure that the gripper and the objects are
inside it. Calibrate with the same framing.
"""

MOST_PIXELS = 8192 * 8192
"""Pixels of the largest frame accepted; a larger one is a mistake, or meant to exhaust memory."""

FRAME_RANK = 3
"""Axes of a frame that is an array: height, width and colour."""

FRAMINGS: tuple[Framing, ...] = get_args(Framing)
"""All values of `Framing`."""

DEPLOYED_AREA = 0.9
"""Share of the square's area that CogACT's server keeps."""

_ORIENTATION = 0x0112  # EXIF's tag; XMP's is reported under the same number by Pillow
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_METADATA = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow looks for an orientation


def rgb_image(image: CameraFrame) -> Image.Image:
    """Return a camera frame as an upright PIL image of mode RGB.

    An orientation in the image's metadata (EXIF or XMP) is applied, as every viewer does; `PIL.Image` itself does not.
    To turn an image's pixels yourself, use `ImageOps.exif_transpose`, which also removes the orientation.

    Args:
        image: PIL image of mode RGB, or uint8 [H,W,3] in RGB order.

    Raises:
        ValueError: the image is not 8-bit RGB, has no pixels, or its orientation cannot be read.
    """
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(
                f"the image has PIL mode {image.mode!r}: expected 'RGB'; use image.convert(\"RGB\"), after scaling it"
                " to 8 bits where it is deeper"
            )
        if 0 in image.size:
            raise ValueError(f"the image has {image.width}x{image.height} pixels; check the camera")
        _check_size(image.width, image.height)
        return upright(image)
    if not isinstance(image, np.ndarray):
        raise ValueError(_describe_other_type(image))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(
            f"the image is an array of {image.dtype} {list(image.shape)}: expected uint8 [H,W,3] in RGB order with at"
            ' least one pixel; open other images with PIL and use image.convert("RGB")'
        )
    _check_size(image.shape[1], image.shape[0])
    return Image.fromarray(image)


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"the image has {width} x {height} pixels: expected at most {MOST_PIXELS:,}, more than any camera frame"
            " needs; scale it down first"
        )


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned by the orientation in its metadata, or the image itself where there is none.

    Raises:
        ValueError: the pixels cannot be read, or the metadata is damaged, so that the orientation is unknown.
    """
    try:
        image.load()  # first: for a TIFF, Pillow turns the pixels here, and removes the orientation
    except (OSError, SyntaxError) as error:  # Pillow's SyntaxError is a damaged chunk
        raise ValueError(f"the image's pixels cannot be read ({error}): the file is cut or damaged") from error
    try:
        # Parsed separately: Pillow's own parser ignores errors, and then reports empty metadata.
        Image.Exif().load(image.info.get("exif", b""))
        orientation = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error) as error:
        raise ValueError(
            f"the image's EXIF data cannot be read ({error}), so which side is up is unknown: remove or rewrite it"
        ) from error
    if orientation not in _UPRIGHT:  # 1, or a value that EXIF reserves
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    for key in _METADATA:
        turned.info.pop(key, None)  # otherwise it would be turned again
    return turned


def fit(image: CameraFrame, side: int, framing: Framing = "whole") -> NDArray[np.uint8]:
    """Return a camera frame as the policy's square image, uint8 [S,S,3].

    Args:
        image: PIL image of mode RGB, or uint8 [H,W,3] in RGB order; its orientation is applied.
        side: S.
        framing: see `Framing`.

    Raises:
        ValueError: the image is refused by `rgb_image`, or the framing is unknown.
    """
    if framing not in FRAMINGS:
        raise ValueError(f"framing={framing!r}: expected one of {', '.join(FRAMINGS)}")
    pixels = rgb_image(image)
    if framing == "deploy":
        pixels = _deployed(pixels, side)
    # PIL's resize to the same size is a copy.
    return np.array(pixels.resize((side, side), Image.Resampling.BICUBIC), dtype=np.uint8)


def _deployed(image: Image.Image, side: int) -> Image.Image:
    """Crop and resize as CogACT's server does, with its rounding; unlike it, also for frames that are not wide."""
    square = min(image.size)
    left, top = (image.width - square) // 2, (image.height - square) // 2
    image = image.crop((left, top, left + square, top + square)).resize((side, side), Image.Resampling.LANCZOS)
    inner = int(side * math.sqrt(DEPLOYED_AREA))
    margin = (side - inner) // 2
    image = image.crop((margin, margin, margin + inner, margin + inner))
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _describe_other_type(image: object) -> str:
    found, remedy = f"the image is a {type(image).__name__}", ""
    if isinstance(image, str | os.PathLike):
        found += f", {image!r:.80}"
        remedy = "; read a file with evla_compile.host.image_file.read_image(path)"
    elif isinstance(image, bytes | bytearray | memoryview):
        found += f" of {len(image)}"
        remedy = "; decode an encoded image with PIL.Image.open(io.BytesIO(data))"
    return f"{found}: expected a PIL image or a uint8 array [H,W,3]{remedy}"

"""Read image files as camera frames: complete, upright, 8-bit RGB and not too large, or an error; no torch."""

import io
import os
import warnings

from PIL import Image, UnidentifiedImageError

from evla_compile.host.camera_frame import MOST_PIXELS, upright

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of the files that are read as camera frames from a folder."""

_EMBEDDED_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow runs other programs for some formats

_SAME_COLOURS = {
    "1": "black and white",
    "L": "greyscale",
    "LA": "greyscale with transparency",
    "P": "of a palette",
    "PA": "of a palette with transparency",
    "RGBA": "RGB with transparency",
}
"""PIL modes whose colours RGB represents exactly, with a description."""


def read_image(path: str | os.PathLike[str], *, convert: bool = False) -> Image.Image:
    """Read an image file whole, of PIL mode RGB and the right way up: an orientation in its EXIF data is applied.

    Args:
        path: the file.
        convert: accept greyscale, palette and opaque RGBA files too, and convert them to RGB.

    Raises:
        ValueError: the file is missing, damaged or no image, has more than `MOST_PIXELS`, is not 8-bit RGB, or has
            transparent pixels.
    """
    return _read(path, str(path), None, convert=convert)


def decode_image(data: bytes, name: str, *, convert: bool = False) -> Image.Image:
    """Decode an image that was embedded in another file; see `read_image`.

    Args:
        data: BMP, JPEG, PNG, TIFF or WebP.
        name: what it is called in messages.
        convert: accept greyscale, palette and opaque RGBA images too, and convert them to RGB.

    Raises:
        ValueError: as for `read_image`.
    """
    return _read(io.BytesIO(data), name, _EMBEDDED_FORMATS, convert=convert)


def _read(
    source: str | os.PathLike[str] | io.BytesIO, path: str, formats: tuple[str, ...] | None, *, convert: bool
) -> Image.Image:
    crowd = f"more than {MOST_PIXELS:,} pixels, which no camera frame needs: scale it down first"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower, and an error
            with Image.open(source, formats=formats) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"image {path} has {image.width} x {image.height} pixels, {crowd}")
                # Pillow opens a 16-bit RGB file as 8-bit RGB, keeping the high bytes alone.
                deep = any(";16" in str(tile[3]) for tile in image.tile)
                image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {path} has {crowd}") from error
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a damaged chunk
        # For embedded images Pillow's message would name an object in memory.
        why = "unknown format" if formats and isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"image {path} cannot be read ({why}): expected an image file such as a PNG") from error
    if deep:
        raise ValueError(f"image {path} has 16 bits a channel: expected 8; scale and save it as 8-bit RGB")
    try:
        turned = upright(image)
    except ValueError as error:
        raise ValueError(f"image {path}: {error}") from error
    return turned if turned.mode == "RGB" else _converted(turned, path, convert=convert)


def _converted(image: Image.Image, path: str, *, convert: bool) -> Image.Image:
    kind = _SAME_COLOURS.get(image.mode)
    if kind is None:
        raise ValueError(f"image {path} has PIL mode {image.mode!r}: expected 8-bit RGB; save it as an RGB PNG or JPEG")
    if not convert:
        raise ValueError(
            f"image {path} is {kind} (PIL mode {image.mode!r}): expected 8-bit RGB, as the policy was trained on; take"
            " its colours as RGB with --convert (convert=True in Python), or save it as an RGB PNG or JPEG"
        )
    opaque = image.convert("RGBA")
    if opaque.getchannel("A").getextrema() != (255, 255):
        raise ValueError(f"image {path} has transparent pixels, and what lies behind them is unknown: flatten it first")
    return opaque.convert("RGB")

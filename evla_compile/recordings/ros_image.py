"""Turn ROS 2 image messages into camera frames; no torch, no ROS.

Shape legend: H, W image size in pixels, C channels.
"""

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from evla_compile.host.camera_frame import MOST_PIXELS
from evla_compile.host.image_file import decode_image
from evla_compile.recordings.recording import import_extra

_HEADER = """
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
"""
DEFINITIONS: Mapping[str, str] = MappingProxyType(
    {
        "sensor_msgs/msg/CompressedImage": "std_msgs/Header header\nstring format\nuint8[] data" + _HEADER,
        "sensor_msgs/msg/Image": (
            "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\n"
            "uint8[] data" + _HEADER
        ),
    }
)
"""The message types that are read, with their definitions.

A bag has definitions of its own. They are not used: a malicious one could describe a message that never ends.
"""

_CHANNELS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2), "bgra8": (2, 1, 0), "mono8": (0, 0, 0)}
)
"""Encodings of 8 bits, with the channels that are red, green and blue. A camera's alpha has no meaning."""

_WIDTHS: Mapping[str, int] = MappingProxyType({"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1})


def image_decoder(message_type: str, *, convert: bool) -> Callable[[bytes], Image.Image]:
    """Return a function that decodes CDR bytes of a message type, one of `DEFINITIONS`, to an image of mode RGB.

    The function raises `ValueError` for a malformed message and for an encoding that is not read.

    Args:
        message_type: the type.
        convert: take greyscale images as RGB.

    Raises:
        CalibrationError: the libraries are not installed.
    """
    records = import_extra("mcap.records", "mcap", "an MCAP bag")
    decoder = import_extra("mcap_ros2.decoder", "mcap", "an MCAP bag")
    schema = records.Schema(id=1, name=message_type, encoding="ros2msg", data=DEFINITIONS[message_type].encode())
    parse = decoder.DecoderFactory().decoder_for("cdr", schema)
    to_image = _compressed if message_type == "sensor_msgs/msg/CompressedImage" else _raw

    def decode(data: bytes) -> Image.Image:
        try:
            message = parse(data)
        except (ValueError, LookupError, RuntimeError, struct.error) as error:
            raise ValueError(f"no {message_type} ({error}): the bag is damaged") from error
        return to_image(message, convert)

    return decode


def _compressed(message: Any, convert: bool) -> Image.Image:
    if "compressedDepth" in message.format:
        raise ValueError(
            f"format {message.format!r:.80} is depth: expected colours; choose the topic of a colour camera"
        )
    return decode_image(bytes(message.data), f"of format {message.format!r:.40}", convert=convert)


def _raw(message: Any, convert: bool) -> Image.Image:
    encoding, height, width, step = message.encoding, message.height, message.width, message.step
    if encoding not in _CHANNELS:
        raise ValueError(f"encoding {encoding!r:.40}: expected one of {', '.join(_CHANNELS)}; republish or convert it")
    if encoding == "mono8" and not convert:
        raise ValueError(
            "encoding mono8 is greyscale: expected colours, as the policy was trained on; take it as RGB with --convert"
            " (convert=True in Python), or choose the topic of a colour camera"
        )
    channels = _WIDTHS[encoding]
    if not 0 < height * width <= MOST_PIXELS or step < width * channels or len(message.data) != height * step:
        raise ValueError(
            f"{width} x {height} pixels of {encoding} in rows of {step} bytes, {len(message.data)} bytes in all:"
            f" expected rows of at least {width * channels} bytes, {height} times {step} bytes in all, and"
            f" {MOST_PIXELS:,} pixels at most"
        )
    rows = np.frombuffer(message.data, dtype=np.uint8).reshape(height, step)[:, : width * channels]
    return Image.fromarray(rows.reshape(height, width, channels)[:, :, _CHANNELS[encoding]])  # uint8 [H,W,3] of [H,W,C]

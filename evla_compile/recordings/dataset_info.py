"""A LeRobotDataset's `meta/info.json`: version, cameras, frame rate and where its files are; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, TypeAlias

from evla_compile.arguments import is_real, is_whole
from evla_compile.errors import CalibrationError
from evla_compile.recordings.dataset_files import place_of, read_json
from evla_compile.recordings.recording import some_of

INFO = Path("meta", "info.json")
"""The file, in the dataset's folder."""

Layout: TypeAlias = Literal["files per episode", "shared files"]
"""How the files of a dataset are laid out: one an episode in format 2, several episodes in a file in format 3."""

VERSIONS: Mapping[str, Layout] = MappingProxyType(
    {"v2.0": "files per episode", "v2.1": "files per episode", "v3.0": "shared files"}
)
"""Versions that are read. What is read of v2.0 is as in v2.1: they differ in their statistics."""

FASTEST = 1000
"""Largest frame rate, frames per second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Camera:
    """An image feature of a dataset."""

    key: str
    """Its name."""
    in_video: bool
    """Whether the frames are in videos; otherwise they are encoded images in the parquet files."""
    problem: str | None
    """Why it is no colour camera; None if it is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """What `meta/info.json` says."""

    folder: Path
    """The dataset."""
    version: str
    """One of `VERSIONS`."""
    fps: float
    """Frames per second."""
    chunk_size: int
    """Episodes of a chunk; of meaning for files per episode."""
    data_path: str
    """Template of the parquet files' paths."""
    video_path: str | None
    """Template of the videos' paths; None without videos."""
    cameras: tuple[Camera, ...]
    """All image features."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check the file.

        Raises:
            CalibrationError: it is missing or malformed, or of a version that is not read; the message says what to do.
        """
        file = folder / INFO
        info = read_json(file)
        if not isinstance(info, dict):
            raise CalibrationError(f"{file} holds a {type(info).__name__}: expected an object")
        version = info.get("codebase_version")
        if not isinstance(version, str) or version not in VERSIONS:
            raise CalibrationError(
                f"{file}: codebase_version is {version!r:.40}, expected one of {', '.join(VERSIONS)}; convert the"
                " dataset with lerobot's own scripts"
            )
        fps, chunk_size = info.get("fps"), info.get("chunks_size", 1000)
        if not is_real(fps) or not 0 < fps <= FASTEST:
            raise CalibrationError(f"{file}: fps is {fps!r:.40}, expected a number in (0, {FASTEST}]")
        if not is_whole(chunk_size) or chunk_size < 1:
            raise CalibrationError(f"{file}: chunks_size is {chunk_size!r:.40}, expected a whole number from 1 up")
        data_path, video_path, features = (info.get(name) for name in ("data_path", "video_path", "features"))
        if not isinstance(data_path, str) or not (video_path is None or isinstance(video_path, str)):
            raise CalibrationError(f"{file}: data_path and video_path are no texts: expected templates of paths")
        if not isinstance(features, dict) or not all(isinstance(about, dict) for about in features.values()):
            raise CalibrationError(f"{file}: features is {features!r:.80}, expected an object for each feature")
        return cls(
            folder=folder,
            version=version,
            fps=float(fps),
            chunk_size=int(chunk_size),
            data_path=data_path,
            video_path=video_path,
            cameras=tuple(_camera(key, about) for key, about in features.items() if _is_image(about)),
        )

    @property
    def layout(self) -> Layout:
        """How the files are laid out."""
        return VERSIONS[self.version]

    def camera(self, wanted: str | None) -> Camera:
        """Return the camera asked for, or the only colour camera.

        Raises:
            CalibrationError: there is no such camera, or there are several to choose from; the message lists them.
        """
        colour = [camera.key for camera in self.cameras if camera.problem is None]
        if wanted is None and len(colour) != 1:
            raise CalibrationError(
                f"{self.folder / INFO} has {len(colour)} colour cameras, {some_of(colour)}: "
                + ("choose one with --camera KEY (camera=KEY in Python)" if colour else "expected one at least")
            )
        name = colour[0] if wanted is None else wanted
        found = next((camera for camera in self.cameras if camera.key == name), None)
        if found is None:
            raise CalibrationError(
                f"{self.folder / INFO} has no camera {name!r:.80}: expected one of its cameras, {some_of(colour)}"
            )
        if found.problem is not None:
            raise CalibrationError(
                f"{self.folder / INFO}: camera {name!r:.80} {found.problem}; choose a colour camera: {some_of(colour)}"
            )
        return found

    def data_file(self, values: Mapping[str, int]) -> Path:
        """Return the parquet file of an episode, whose chunk and file have these numbers.

        Raises:
            CalibrationError: the template is malformed or leads out of the folder.
        """
        return place_of(self.folder, self.data_path, values, f"{self.folder / INFO}: data_path")

    def video_file(self, key: str, values: Mapping[str, int]) -> Path:
        """Return the video of a camera and an episode, whose chunk and file have these numbers.

        Raises:
            CalibrationError: there is no template, or it is malformed or leads out of the folder.
        """
        source = f"{self.folder / INFO}: video_path"
        if self.video_path is None:
            raise CalibrationError(f"{source} is missing, and {key!r:.80} is a video: expected a template of paths")
        return place_of(self.folder, self.video_path, {"video_key": key, **values}, source)


def _is_image(about: Mapping[str, Any]) -> bool:
    return about.get("dtype") in ("video", "image")


def _camera(key: str, about: Mapping[str, Any]) -> Camera:
    return Camera(key=key, in_video=about["dtype"] == "video", problem=_problem(about))


def _problem(about: Mapping[str, Any]) -> str | None:
    """Return why an image feature is no colour camera; None if it is one, or if nothing is said."""
    details = about.get("info") or about.get("video_info")
    if isinstance(details, dict) and any(details.get(name) is True for name in ("video.is_depth_map", "is_depth_map")):
        return "is a depth map: expected colours"
    shape, names = about.get("shape"), about.get("names")
    if not isinstance(shape, list) or len(shape) != 3:
        return f"has shape {shape!r:.40}: expected [height, width, 3]"
    axis = next(
        (
            place
            for place, name in enumerate(names if isinstance(names, list) else ())
            if str(name).startswith("channel")
        ),
        None,
    )
    counts = [shape[0], shape[-1]] if axis is None or axis > 2 else [shape[axis]]
    if 3 in counts:
        return None
    return f"has {counts[-1]!r:.20} channels: expected 3, red, green and blue"

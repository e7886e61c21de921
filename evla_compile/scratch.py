"""Write files atomically: into a scratch folder beside their place, then by renaming; no torch.

A scratch folder is locked as long as its process lives, so that the next writer can tell an abandoned one from one in
use. This protects against the death of a process, not against power loss: for that, the manifest has hashes.
"""

import fcntl
import logging
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Literal

JOURNAL = "journal.json"
"""File that describes an unfinished move of several files; its scratch folder is needed to finish the move."""

_LOCK = "lock"
_NEW = "new"
_log = logging.getLogger(__name__)


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """Yield a new folder `.NAME.partial-TOKEN` beside `place`; it is removed at the end, a SIGTERM included.

    It is not removed while it contains a `JOURNAL`: a move that could not be undone still has to be finished.

    Raises:
        OSError: the folder cannot be created or removed.
    """
    with exiting_on_sigterm():
        folder, lock = _create(place)
        try:
            yield folder
        finally:
            try:
                if not (folder / JOURNAL).exists():
                    _remove(folder)
            finally:
                lock.close()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` if the block succeeds.

    What killed writers of `path` have left is removed.

    Raises:
        OSError: the file cannot be written; `path` is as it was.
    """
    place = path.resolve()  # a link stays one, as when it is opened for writing
    if place.exists() and not place.is_file():
        raise OSError(f"{place} is no regular file, so it is not replaced")
    remove_stale(place)
    with scratch(place) as folder:
        new = new_folder(folder) / place.name
        yield new
        new.replace(place)


def new_folder(folder: Path) -> Path:
    """Return the folder inside a scratch folder for the new files, which are then moved into place."""
    new = folder / _NEW
    new.mkdir(exist_ok=True)
    return new


def partials(place: Path) -> list[Path]:
    """Return the scratch folders beside `place`, in use or abandoned."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.partial-[0-9a-f]+")
    try:
        found = [path for path in place.parent.iterdir() if pattern.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def remove_stale(place: Path, finish: Callable[[Path], None] | None = None) -> None:
    """Remove the scratch folders beside `place` whose process is dead, and log a warning for each.

    Folders whose owner is unknown, because the file system has no locks or they belong to another user, are kept.

    Args:
        place: path that they were created for.
        finish: called with each folder before it is removed, to finish the move that its `JOURNAL` describes.
    """
    for folder in partials(place):
        try:
            lock = _take_stale(folder)
        except OSError as error:
            _log.warning("%s may be left from a process that was killed, and cannot be examined: %s", folder, error)
            continue
        if lock is None:
            continue
        with lock:
            if finish is not None:
                finish(folder)
            elif (folder / JOURNAL).exists():
                continue
            size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
            try:
                _remove(folder)
            except OSError as error:
                _log.warning("%s was left by a process that was killed, and cannot be removed: %s", folder, error)
            else:
                _log.warning("removed %s (%.1f MB), left by a process that was killed", folder, size / 1e6)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes from moving files into or out of a folder within this block.

    Where the file system has no locks there is no such protection; even then a move refuses to replace files that it
    does not know.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            _log.info("%s cannot be locked: %s", folder, error)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """Within this block SIGTERM raises SystemExit(143) as SIGINT raises KeyboardInterrupt, so that clean-ups run.

    It applies to Python's main thread alone, which receives signals, and not where the program handles SIGTERM itself.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _create(place: Path) -> tuple[Path, IO[str]]:
    while True:
        # Not tempfile.mkdtemp: a folder that is renamed into place would keep its mode 0700.
        folder = place.with_name(f".{place.name}.partial-{secrets.token_hex(4)}")
        folder.mkdir()
        try:
            lock = _take_lock(folder, "a")
        except FileNotFoundError:
            continue  # removed by a process that saw it before it was locked
        except OSError:  # no locks on this file system: then no process removes it as stale either
            lock = (folder / _LOCK).open("a")
        if lock is not None:
            return folder, lock


def _remove(folder: Path) -> None:
    """Remove a scratch folder, its lock last: an empty folder without a lock is being created or removed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
    (folder / _LOCK).unlink(missing_ok=True)
    with suppress(FileNotFoundError):  # another process saw it empty
        folder.rmdir()


def _take_stale(folder: Path) -> IO[str] | None:
    """Return the lock of an abandoned scratch folder; None where it is in use, or gone.

    Raises:
        OSError: the file system cannot lock, or refuses access.
    """
    try:
        return _take_lock(folder, "r+")
    except FileNotFoundError:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return None
        except OSError:  # not empty: its lock came in the meantime, or it never had one
            return _take_lock(folder, "a")
        return None


def _take_lock(folder: Path, mode: Literal["a", "r+"]) -> IO[str] | None:
    """Return the lock of a scratch folder, released by closing it; None where a living process has it.

    Raises:
        FileNotFoundError: the folder is gone, or has no lock and `mode` does not create one.
        OSError: the file system cannot lock, or refuses access.
    """
    path = folder / _LOCK
    file = path.open(mode)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError(f"{path} was replaced")
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file

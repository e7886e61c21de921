"""Keep the kernels that TensorRT-RTX compiles for this GPU in a file, for the next process; no torch."""

import logging
from pathlib import Path
from typing import Any

from evla_compile.errors import EvlaError
from evla_compile.scratch import replacing

logger = logging.getLogger(__name__)


def prepare_cache(folder: Path) -> None:
    """Create the folder of a cache if it does not exist.

    Raises:
        EvlaError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvlaError(f"cache={folder} cannot be created: {error}; name a folder that can be written") from error


class KernelCache:
    """The kernels of one engine."""

    def __init__(self, settings: Any, file: Path) -> None:
        """Give TensorRT-RTX the kernels in a file, if there is one, and let it collect new ones.

        Kernels that it refuses, those of another GPU, driver or version for instance, are reported as a warning: it
        compiles them again, and they replace the file in the end.

        Args:
            settings: the library's runtime configuration, of which the context is then created.
            file: where they are kept.

        Raises:
            EvlaError: the file cannot be read, or the library has no cache of kernels.
        """
        self._file = file
        self._cache = settings.create_runtime_cache()
        if self._cache is None:
            raise EvlaError(f"TensorRT-RTX cannot create a cache of kernels for {file}: load the policy without cache=")
        try:
            known = file.read_bytes() if file.exists() else b""
        except OSError as error:
            raise EvlaError(f"kernels cannot be read from {file}: {error}; name another cache= folder") from error
        if known and not self._cache.deserialize(known):
            logger.warning(
                "TensorRT-RTX refuses the kernels in %s, which are of another GPU, driver or version, or damaged: it"
                " compiles them again, and they are replaced when the policy is closed",
                file,
            )
        if not settings.set_runtime_cache(self._cache):
            raise EvlaError(f"TensorRT-RTX does not take a cache of kernels for {file}: load the policy without cache=")

    def keep(self) -> None:
        """Write the collected kernels to the file.

        Raises:
            EvlaError: the library returns none, or the file cannot be written.
        """
        contents = self._cache.serialize()
        if contents is None:
            raise EvlaError(f"TensorRT-RTX does not give its kernels, which were to be kept in {self._file}")
        try:
            with replacing(self._file) as new:
                new.write_bytes(bytes(contents))
        except OSError as error:
            raise EvlaError(f"kernels cannot be kept in {self._file}: {error}") from error

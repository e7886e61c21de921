"""Move several files into place together; if the process is killed at any step, the move can be finished; no torch.

A scratch folder has the new files in `new`, receives the former ones in `old`, and has a journal from before the first
move until after the last. The places of the files show how far the move has come, so that it can be resumed or undone
from any step. The manifest leaves first and arrives last: while files of two artifacts are mixed, there is none.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from evla_compile.artifact.integrity import mismatch
from evla_compile.artifact.records import FileRecord
from evla_compile.errors import ArtifactError
from evla_compile.json_text import to_json_text
from evla_compile.scratch import JOURNAL, exclusive, new_folder

_KEYS = {"former", "new", "manifest"}


def put_in_place(folder: Path, destination: Path, former: Sequence[FileRecord], manifest: str) -> None:
    """Replace former files of a destination by the new files of a scratch folder; all or none.

    Call it under `exclusive(destination)`, so that `former` is still true.

    Args:
        folder: the scratch folder.
        destination: an existing folder on the same file system.
        former: files of the destination that are replaced or removed.
        manifest: name of the manifest, which leaves first and arrives last.

    Raises:
        ArtifactError: a file that is not among `former` is in the place of a new one.
        OSError: a file cannot be moved; all is as before.
    """
    names = tuple(sorted(path.name for path in new_folder(folder).iterdir()))
    move = _Move(folder=folder, destination=destination, former=tuple(former), new=names, manifest=manifest)
    move.refuse_strangers(hashes=False)
    journal = folder / JOURNAL
    move.write(journal)
    try:
        move.forward()
        journal.unlink()
    except BaseException:
        move.back()
        journal.unlink(missing_ok=True)
        raise


def finish(folder: Path, destination: Path) -> None:
    """Finish the move that a killed process left in a scratch folder, if it had begun.

    Raises:
        ArtifactError: by now another file is in the way, or a former one has changed; or the journal is malformed.
        OSError: a file cannot be moved.
    """
    journal = folder / JOURNAL
    if not journal.exists():
        return
    if not destination.exists():  # its folder was deleted since: there is nothing left to finish or to protect
        journal.unlink()
        return
    with exclusive(destination):
        move = _Move.read(journal, destination)
        move.refuse_strangers(hashes=True)
        move.forward()
        journal.unlink()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Move:
    folder: Path
    destination: Path
    former: tuple[FileRecord, ...]
    new: tuple[str, ...]
    manifest: str

    def write(self, journal: Path) -> None:
        """Write the journal, whole or not at all."""
        data = {"former": [asdict(record) for record in self.former], "new": self.new, "manifest": self.manifest}
        draft = journal.with_name(f"{journal.name}.draft")
        draft.write_text(to_json_text(data), encoding="utf-8")
        draft.replace(journal)

    @classmethod
    def read(cls, journal: Path, destination: Path) -> Self:
        """Read a journal; an ArtifactError says what to do about one that is malformed."""
        try:
            data: dict[str, Any] = json.loads(journal.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.keys() != _KEYS:
                raise ValueError(f"expected an object with the keys {', '.join(sorted(_KEYS))}")
            names = [*data["new"], data["manifest"]]
            for name in names:
                FileRecord(name=name, sha256="0" * 64, size=0)  # refuses a name that leads elsewhere
            former = tuple(map(FileRecord.from_json, data["former"]))
            new = tuple(data["new"])
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"{journal}: {error}; it describes an export that was killed: remove {journal.parent}"
            ) from error
        return cls(folder=journal.parent, destination=destination, former=former, new=new, manifest=data["manifest"])

    def forward(self) -> None:
        """Move what has not been moved yet: former files out, then new ones in."""
        (self.folder / "old").mkdir(exist_ok=True)
        for name in self._manifest_first(record.name for record in self.former):
            if self._stays(name):
                (self.destination / name).replace(self.folder / "old" / name)
        for name in reversed(self._manifest_first(self.new)):
            if (self.folder / "new" / name).exists():
                (self.folder / "new" / name).replace(self.destination / name)

    def back(self) -> None:
        """Move back what has been moved: new files out, then former ones in."""
        for name in self._manifest_first(self.new):
            if not (self.folder / "new" / name).exists() and _exists(self.destination / name):
                (self.destination / name).replace(self.folder / "new" / name)
        for name in reversed(self._manifest_first(record.name for record in self.former)):
            if _exists(self.folder / "old" / name):
                (self.folder / "old" / name).replace(self.destination / name)

    def refuse_strangers(self, *, hashes: bool) -> None:
        """Refuse to move or replace a file that is neither new nor former."""
        waiting = [name for name in self.new if (self.folder / "new" / name).exists()]
        staying = {record.name: record for record in self.former if self._stays(record.name)}
        for name in sorted({*waiting, *staying}):
            place = self.destination / name
            changed = name in staying and mismatch(staying[name], place, hashes=hashes) is not None
            if changed or (name not in staying and _exists(place)):
                raise ArtifactError(
                    f"{place} is not ours, or has changed since an export was killed that would replace it: move it"
                    " elsewhere, then export again"
                )

    def _stays(self, name: str) -> bool:
        """Tell whether a former file is still in its place: its successor, which would take it, has not moved."""
        successor_moved = name in self.new and not (self.folder / "new" / name).exists()
        return not successor_moved and not _exists(self.folder / "old" / name) and _exists(self.destination / name)

    def _manifest_first(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (name != self.manifest, name))


def _exists(path: Path) -> bool:
    return os.path.lexists(path)

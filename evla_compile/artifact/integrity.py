"""Whether a file is the one that a manifest describes; no torch."""

from pathlib import Path

from evla_compile.artifact.records import FileRecord


def mismatch(record: FileRecord, path: Path, *, hashes: bool = True) -> str | None:
    """Return how a file differs from its record, as a phrase to follow its name in a message; None where it does not.

    Args:
        record: record of the file in the manifest.
        path: the file.
        hashes: whether to read the file through for its SHA-256; otherwise only presence and size are compared. A link
            to another folder, as in Hugging Face's cache, is always read: only its contents can show that it is the
            right file.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.is_file():
        return "is missing"
    leads_out = path.resolve().parent != path.parent.resolve()
    size = path.stat().st_size
    found = FileRecord.measure(path).sha256 if size == record.size and (hashes or leads_out) else record.sha256
    differs = size != record.size or found != record.sha256
    if leads_out and differs:
        return f"is a link that leads out of the artifact, to {path.resolve()}, which the manifest does not describe"
    if size != record.size:
        return f"has {size} bytes, the manifest says {record.size}"
    if found != record.sha256:
        return f"has the SHA-256 {found[:12]}..., the manifest says {record.sha256[:12]}..."
    return None

"""Errors that name what was expected, what was found, where, and what to do."""

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CheckpointError",
    "EvlaError",
    "ExportError",
    "PassError",
    "UnsupportedModelError",
    "VerificationError",
]


class EvlaError(Exception):
    """Base of every error that this package raises on purpose; wrong argument values raise `ValueError`."""


class CheckpointError(EvlaError):
    """A checkpoint, its statistics or its tokenizer is missing, damaged, or not in CogACT's layout."""


class UnsupportedModelError(EvlaError):
    """A checkpoint is sound, but describes a model that this package cannot build."""


class CalibrationError(EvlaError):
    """Frames are missing, malformed or too few, a plan does not fit the policy, or a certificate is malformed."""


class PassError(EvlaError):
    """A rewrite was asked for and its site was not found, or the graph is not in the form that it needs."""


class ExportError(EvlaError):
    """A graph could not be lowered, or its file could not be written."""


class ArtifactError(EvlaError):
    """A compiled artifact is missing, damaged, or is for another machine or version."""


class VerificationError(EvlaError):
    """A lowered or rewritten policy differs from its reference by more than the tolerance table allows."""

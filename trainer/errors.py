"""Typed errors of the trainer: each says which file, what was found, what was expected, what to do next."""

from __future__ import annotations

from pathlib import Path


class TrainerError(ValueError):
    """Something that the user can put right; ``main`` prints it without a traceback."""

    def __init__(self, file: str | Path, *, found: str, expected: str, next_step: str) -> None:
        self.file, self.found, self.expected, self.next_step = str(file), found, expected, next_step
        super().__init__(f"{file}: found {found}; expected {expected}. Next step: {next_step}")


class ConfigError(TrainerError):
    """An unknown knob, or a value that does not fit it."""


class DamagedShards(TrainerError):
    """A shard, its index or its vocabulary does not hold what was recorded for it."""


class VocabularyMismatch(TrainerError):
    """Gene indices that count rows of another vocabulary, or counts normalised to another total."""


class NonFiniteLoss(TrainerError):
    """The loss became infinite or NaN."""


class SettingsChanged(TrainerError):
    """A snapshot of a run with other settings or other shards."""


class DamagedSnapshot(TrainerError):
    """A snapshot that does not hold what was written into it."""


class RankLost(TrainerError):
    """Another rank of the run ended, or did not answer in time."""


class TooLittleMemory(TrainerError):
    """A step needs more memory than there is; says which batch would fit."""

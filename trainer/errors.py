"""Typed errors of the trainer: each says which file, what was found, what was expected, what to do next."""

from __future__ import annotations

REBUILD = "rebuild the shards (delete the folder, run `snakemake data`)"


class TrainerError(ValueError):
    """Something that the user can put right; ``main`` prints it without a traceback."""

    next_step = ""  # of its kind, where nobody names a better one

    def __init__(self, file: object, found: object, expected: object, next_step: str = "") -> None:
        self.file, self.found, self.expected = str(file), str(found), str(expected)
        self.next_step = next_step or self.next_step
        super().__init__(f"{file}: found {found}; expected {expected}. Next step: {self.next_step}")


class ConfigError(TrainerError):
    """An unknown knob, or a value that does not fit it."""


class DamagedShards(TrainerError):
    """A shard, its index or its vocabulary does not hold what was recorded for it."""

    next_step = REBUILD


class VocabularyMismatch(TrainerError):
    """Gene indices that count rows of another vocabulary, or counts normalised to another total."""

    next_step = REBUILD


class NonFiniteLoss(TrainerError):
    """The loss became infinite or NaN."""

    next_step = "lower --lr, add --warmup, or set --clip 1; --log-every 1 names the very step"


class SettingsChanged(TrainerError):
    """A snapshot of a run with other settings or other shards."""


class DamagedSnapshot(TrainerError):
    """A snapshot that does not hold what was written into it."""


class DamagedFile(TrainerError):
    """A file of ours that does not hash to what it records of itself."""

    next_step = "restore it from a copy, or delete it and make it again"


class DiskFull(TrainerError):
    """No room to write, or a quota used up."""

    next_step = "make room there, then the same command again; training goes on from its last snapshot"


class RankLost(TrainerError):
    """Another rank of the run ended, or did not answer in time."""

    next_step = "see what the other ranks said; the same command goes on from the last snapshot"


class TooLittleMemory(TrainerError):
    """A step needs more memory than there is; says which batch would fit."""


class DamagedProbeInput(TrainerError):
    """Features, classes or splits that the probe cannot use, or that do not belong together."""

    next_step = "delete the file and run again, so that its rule writes it anew"

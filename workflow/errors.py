"""Typed errors of the pipeline: each says which slice and file, what was found, what was expected, what to do next."""

from __future__ import annotations

from functools import partial

FIELDS = ("slice", "file", "found", "expected", "next_step")  # what an error is made of


class SliceError(ValueError):
    """A slice that can't be used as it is.

    Parameters
    ----------
    slice
        Name of the slice in the catalogue.
    found
        What was seen, with the numbers.
    expected
        What the stage needs.
    next_step
        What the user can do about it.
    file
        The file in which it was seen, if there is one.
    """

    code = "error"
    stage = "curate"

    def __init__(self, *, slice: str, found: str, expected: str, next_step: str, file: str = "") -> None:
        self.slice, self.file = str(slice), str(file)
        self.found, self.expected, self.next_step = found, expected, next_step
        where = f" ({self.file})" if self.file else ""
        super().__init__(
            f"[{self.code}] slice {self.slice}{where}: found {found}; expected {expected}. Next step: {next_step}"
        )

    def __reduce__(self) -> tuple:
        """How a process that looked at a slice hands the error to the one that asked; pickle's own way knows no keywords."""
        return partial(type(self), **{name: getattr(self, name) for name in FIELDS}), (), vars(self)

    def as_row(self) -> dict[str, str]:
        """The row of the quarantine table (all strings)."""
        return {
            "slice": self.slice,
            "stage": self.stage,
            "code": self.code,
            "file": _one_line(self.file),
            "found": _one_line(self.found),
            "expected": _one_line(self.expected),
            "next_step": _one_line(self.next_step),
        }

    @staticmethod
    def kinds() -> list[type[SliceError]]:
        """All kinds of slice errors, each with a code of its own."""
        found: list[type[SliceError]] = []
        left = SliceError.__subclasses__()
        while left:
            found.append(left.pop(0))
            left += found[-1].__subclasses__()
        return found

    @classmethod
    def from_row(cls, row: dict[str, str]) -> SliceError:
        """The error that a row of the quarantine table tells of: the subclass that has its code."""
        (kind,) = (kind for kind in cls.kinds() if kind.code == row["code"])
        error = kind(**{name: row[name] for name in FIELDS})
        error.stage = row["stage"]
        return error


def _one_line(text: str, longest: int = 2000) -> str:
    """What a table and HDF5 can hold of a text that may repeat what a file says: no control characters, and an end."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:longest])
    return shown + ("..." if len(text) > longest else "")


class MissingFile(SliceError):
    code = "missing_file"


class UnknownFormat(SliceError):
    code = "unknown_format"


class Unreadable(SliceError):
    """Truncated or corrupt h5, gzip, MEX or table."""

    code = "unreadable"


class MissingPositions(SliceError):
    code = "missing_positions"


class PositionsMismatch(SliceError):
    """The positions belong to another sample: too few barcodes in common."""

    code = "positions_mismatch"


class NotCounts(SliceError):
    """Normalised, scaled, negative, fractional or NaN values where raw integer counts belong."""

    code = "not_counts"


class Transposed(SliceError):
    code = "transposed"


class EmptySlice(SliceError):
    code = "empty"


class CountOverflow(SliceError):
    """A count above 65,535 does not fit the grid's 16 bits."""

    code = "count_overflow"


class WrongOrganism(SliceError):
    code = "wrong_organism"


class UnknownGenes(SliceError):
    """Hardly any gene name could be mapped to an Ensembl id."""

    code = "unknown_genes"


class MultipleSections(SliceError):
    """A CELLXGENE file with ``is_single`` false holds several sections."""

    code = "multiple_sections"


class BadLabels(SliceError):
    code = "bad_labels"


class RankOnPixels(SliceError):
    """Ranks of pixel coordinates were asked for: every spot would get its own row and column."""

    code = "rank_on_pixels"
    stage = "grid"


class NoLattice(SliceError):
    """No regular lattice fits the pixel coordinates."""

    code = "no_lattice"
    stage = "grid"


class CellCollision(SliceError):
    code = "cell_collision"
    stage = "grid"


class WindowTooLarge(SliceError):
    """No window of the slice reaches the least fraction of observed cells."""

    code = "window_too_large"
    stage = "shards"


class TooFewGenes(SliceError):
    """Fewer measured genes than a window draws."""

    code = "too_few_genes"
    stage = "shards"


class DamagedFile(SliceError):
    """An intermediate file does not hold what was recorded for it."""

    code = "damaged"
    stage = "shards"


class DownloadFailed(SliceError):
    """The server did not give the file within the attempts allowed, or refused."""

    code = "download_failed"
    stage = "download"


class SourceChanged(SliceError):
    """The size or checksum of a file is not the one that the catalogue pins."""

    code = "source_changed"
    stage = "download"


class RefusedUrl(SliceError):
    """Not http(s), or a redirect to a host that nobody named."""

    code = "refused_url"
    stage = "download"


class UnsafeArchive(SliceError):
    """A member with an absolute path, `..`, a link or a device, or more data than an archive of its size may hold."""

    code = "unsafe_archive"
    stage = "download"


class TooFewCommonGenes(SliceError):
    """The sections of a dataset share fewer genes than the controls need."""

    code = "too_few_common_genes"
    stage = "score"


class CatalogueError(ValueError):
    """A table of slices or the config breaks its schema: names the file, the row or key, and the remedy."""


class UnsafeName(SliceError):
    """A listing names a file that leads out of its folder."""

    code = "unsafe_name"
    stage = "download"


class MultipleOrganisms(SliceError):
    """Genes of more than one genome: a xenograft or a mixture, whose counts are of two organisms."""

    code = "multiple_organisms"


class ZeroBytes(Unreadable):
    """A file of no bytes, as an interrupted copy or a full disk leaves it."""

    code = "zero_bytes"


class Truncated(Unreadable):
    """An h5 or gzip file that ends before its own end."""

    code = "truncated"


class WrongHeader(Unreadable):
    """A first line taken for a header, or a header for a first line: one spot or gene too few or too many."""

    code = "wrong_header"


class UnsafeHdf5(SliceError):
    """An HDF5 file that leads out of itself, into itself, or claims more data than it stores."""

    code = "unsafe_hdf5"


class Normalised(NotCounts):
    """Fractions: values divided by the spots' totals, or their logarithms."""

    code = "normalised"


class Scaled(NotCounts):
    """Negative fractions: z-scores or centred values."""

    code = "scaled"


class Negative(NotCounts):
    """Whole numbers, some below zero: differences, or counts with a background taken off."""

    code = "negative"


class NotFinite(NotCounts):
    """NaN or infinite values."""

    code = "not_finite"


class NoTissue(EmptySlice):
    """Spots, none of which is marked as in tissue."""

    code = "no_tissue"


class SwappedAxes(PositionsMismatch):
    """Array row and column exchanged."""

    code = "swapped_axes"


class ImpossiblePositions(SliceError):
    """Positions that no capture area has."""

    code = "impossible_positions"

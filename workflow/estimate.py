"""What a run will still fetch, store and take: an estimate made from the table of slices and a look at which files are there.

Rule files import this module: nothing but the standard library, and nothing is opened, so that a dry run stays instant.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from workflow.sources import REMOTE_SOURCES

GB = 1e9
TYPICAL_SPOTS = 2000  # where a source states none; about the median of those that do in visium_human.tsv

# What was measured: real slices of three depths (370, 2,000 and 5,300 nonzero counts a spot; docs/real-slices.md names them), one
# core, 512 genes. Bytes a spot: curated 1,450 / 4,600 / 11,700, grid 750 / 1,750 / 4,300; h5 1.8 and MEX 3.9 bytes a nonzero.
# Seconds: curate 0.0001 to 0.001 a spot, grid 0.0002 to 0.0003; a window 0.0024 to 0.011, 34 to 46 kB at 512 genes x 16 x 16; 0.02 to 0.03 s and 480 kB at 8,192.
# Of 50 simulated slices (docs/scale.md): 2.2 and 0.87 bytes a nonzero, 1.4 CPU seconds to start a job.
CURATED, GRID = 7000, 2900  # bytes a spot, at about 3,300 nonzeros
PACKED_WINDOW = 0.31  # bytes a gene and cell
SPOT_SECONDS, WINDOW_SECONDS, GENE_SECONDS = 0.0015, 0.006, 2.4e-6  # the last: a gene of a window
JOB_SECONDS, JOBS = 2.0, 6  # to start a job, jobs a slice

# What is assumed: (bytes a spot, bytes besides) of what a source deposits, where `bytes` is blank. Matrices as above, a CELLXGENE
# h5ad twice over (raw and normalised); besides, images, which lie in the same archive or file.
DEPOSITED = {
    "spaceranger": (7000, 10e6),
    "geo": (14000, 10e6),
    "cellxgene": (20000, 20e6),
    "h5ad": (10000, 10e6),
    "legacy_st": (7000, 0),
    "auto": (14000, 10e6),
}
CONNECTION = 5e6  # bytes a second


@dataclass(frozen=True)
class Estimate:
    """What is still to be done, by count, bytes and seconds of one core."""

    slices: int
    simulated: int
    downloads: int
    guessed: int  # downloads whose size no source states
    download_bytes: float
    disk_bytes: float  # downloads included
    core_seconds: float

    def hours(self, cores: int) -> float:
        """Hours on so many cores, each with a connection of its own."""
        return (self.core_seconds + self.download_bytes / CONNECTION) / cores / 3600

    def line(self, cores: int, free: int) -> str:
        """Text for the user; `free` bytes of disk."""
        simulated = f", {self.simulated} of them simulated" if self.simulated else ""
        guessed = f" (the size of {self.guessed} is guessed)" if self.guessed else ""
        on = f"{_duration(self.hours(cores))} on {cores} core{'s' if cores > 1 else ''}"
        if (here := os.cpu_count() or 1) > cores:  # a dry run counts one core, unless told otherwise
            on += f" ({_duration(self.hours(here))} on the {here} of this machine)"
        return (
            f"Estimate of what is still to do: {self.slices} slices{simulated}; {self.downloads} to download, "
            f"{self.download_bytes / GB:.1f} GB{guessed}; {self.disk_bytes / GB:.1f} GB of disk ({free / GB:.1f} GB free); "
            f"{on}, at {CONNECTION / 1e6:.0f} MB/s a connection."
        )

    def refusal(self, free: int, min_free_gb: float) -> str:
        """Why the disk is too small, "" if it isn't."""
        if not self.disk_bytes or self.disk_bytes + min_free_gb * GB <= free:
            return ""
        return (
            f"The disk is too small: found {free / GB:.1f} GB free in {Path.cwd()}; expected "
            f"{self.disk_bytes / GB:.1f} GB for what is still to do, of which {self.download_bytes / GB:.1f} GB are downloads, and "
            f"{min_free_gb:g} GB to spare. Next step: make room, run in a folder on a larger disk (--directory), take rows out of "
            "the catalogue, or, if you know better, set min_free_gb in the config (a negative number allows that much more)."
        )


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"about {hours:.0f} h"
    return f"about {max(1, math.ceil(hours * 60))} min"


def estimate(
    slices: Iterable[dict[str, str]],
    *,
    results: str,
    windowed: Collection[str],
    windows_per_slice: int,
    max_coverage: float,
    window: tuple[int, int],
    genes: int,
    root: Path = Path(),
) -> Estimate:
    """What a run would still have to do for these slices.

    Parameters
    ----------
    slices
        Rows of the catalogue, one a slice.
    results
        The config's prefix of all outputs.
    windowed
        Names of the slices that windows are drawn from.
    windows_per_slice, max_coverage, window, genes
        Of the config.
    root
        The working directory.
    """
    built = all((root / results / "shards" / split / "index.json").exists() for split in ("train", "val"))
    n = simulated = downloads = guessed = 0
    download_bytes = disk_bytes = seconds = 0.0
    archives: set[str] = set()
    for row in slices:
        name, spots = row["slice"], int(row["spots"] or TYPICAL_SPOTS)
        fetched = row["source"] not in REMOTE_SOURCES or (root / f"resources/download/{name}/files.json").exists()
        curated = (root / results / f"slices/{name}.h5ad").exists()
        gridded = built or (root / results / f"grids/{name}.zarr").exists()
        if fetched and curated and gridded and built:
            continue
        n += 1
        simulated += row["source"] == "simulated"
        if not fetched:
            size, known = deposited_bytes(row, spots)
            archive = row["url"].split("#")[0] if "member=" in row["url"] and " " not in row["url"] else ""
            downloads += 1
            if archive and archive in archives:  # fetched once for all
                size = 0.0
            else:
                guessed += not known
            archives.add(archive)
            download_bytes += size
            disk_bytes += size
        disk_bytes += spots * ((not curated) * CURATED + (not gridded) * GRID)
        seconds += JOBS * JOB_SECONDS + (not gridded) * spots * SPOT_SECONDS
        if not built and name in windowed:  # twice: each slice's pack, and the tars that it is copied into
            n_windows = windows_of(windows_per_slice, max_coverage, spots, window)
            disk_bytes += 2 * PACKED_WINDOW * n_windows * genes * window[0] * window[1]
            seconds += n_windows * (WINDOW_SECONDS + genes * GENE_SECONDS)
    return Estimate(n, simulated, downloads, guessed, download_bytes, disk_bytes, seconds)


def windows_of(most: int, max_coverage: float, spots: int, window: tuple[int, int]) -> int:
    """Windows to draw of a slice: at most `most`, and so few (but one) that a spot lies in `max_coverage` of them on average.

    Without that a legacy section of 300 spots has as many windows as a Visium one of 4,000, and is learned by heart. 0: no limit.
    """
    cap = round(max_coverage * spots / (window[0] * window[1])) if max_coverage else most
    return max(1, min(most, cap))


def deposited_bytes(row: dict[str, str], spots: int) -> tuple[float, bool]:
    """Bytes that a slice's source holds, and whether the catalogue says so (for every url)."""
    stated = [int(size) for size in row["bytes"].split()]
    if stated and len(stated) == len(row["url"].split()):
        return float(sum(stated)), True
    a_spot, besides = DEPOSITED[row["format"]]
    return max(float(sum(stated)), spots * a_spot + besides), False


def cores_of(cores: int | None, nodes: int | None) -> int:
    """Cores that a run has: as told, but of one machine at most what it has; those of this machine where nothing was told."""
    here = os.cpu_count() or 1
    return max(1, nodes or min(cores or here, here))

"""Rule `foreign`: an encoder or baseline of others on all sections of a dataset, or the reason why it can't run here.

How each is called stands in `workflow.foreign_methods`. All sections of a dataset are embedded by one job: a baseline that is
fitted must be fitted on them together, or its axes would mean something else in each.
"""

import contextlib
import logging
import sys
from pathlib import Path

import h5py
import numpy as np
from anndata.io import read_elem

from workflow.controls import load_section
from workflow.foreign_methods import METHODS, Absent, Given
from workflow.keys import Keys
from workflow.reading import reading
from workflow.sealed import as_safetensors

logger = logging.getLogger("foreign")

FORMAT_VERSION = "1"


def symbols_of(path: str | Path) -> np.ndarray:
    """Gene symbols of a curated slice, object [k]; "" where unknown."""
    with reading(path), h5py.File(path) as file:
        return read_elem(file["var"])[Keys.SYMBOL].to_numpy(dtype=object)


def embed(method: str, given: Given, again: str) -> tuple[list[np.ndarray], str]:
    """Vectors of all sections, float32 [n_spots, d] each, and "", or none and the reason why the method can't run here.

    Parameters
    ----------
    method
        A key of `foreign_methods.METHODS`.
    given
        The sections, and what the config says.
    again
        What to do once what is missing is there, for the reason's end.

    Raises
    ------
    ValueError
        The method gave another number of spots than it got, or values that aren't finite.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # they print; what they say belongs in the log
            vectors = [np.asarray(x, dtype=np.float32) for x in METHODS[method](given)]
    except Absent as absent:
        logger.warning("%s is skipped: %s", method, absent)
        return [], f"{absent}. Next step: {again}"
    for section, x in zip(given.sections, vectors, strict=True):
        if x.ndim != 2 or len(x) != section.n_spots or not np.isfinite(x).all():
            raise ValueError(
                f"{method} on slice {section.name}: found vectors of shape {x.shape}, {int(np.isfinite(x).sum())} values of "
                f"them finite; expected one finite vector for each of {section.n_spots} spots. Next step: take {method} out of "
                "evaluate.foreign, or install the version of its package that envs/ names."
            )
    return vectors, ""


def write(
    path: str | Path, method: str, dataset: str, names: list[str], vectors: list[np.ndarray], skipped: str
) -> None:
    """One safetensors of a dataset: a tensor a slice, by its name; the reason in the metadata where there are none."""
    about = {"format_version": FORMAT_VERSION, "method": method, "dataset": dataset} | (
        {"skipped": skipped} if skipped else {}
    )
    tensors = {} if skipped else dict(zip(names, map(np.ascontiguousarray, vectors), strict=True))
    Path(path).write_bytes(as_safetensors(tensors, about))


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    params, method = snakemake.params, snakemake.wildcards.method
    sections = [load_section(path) for path in snakemake.input.slices]
    given = Given(
        sections=sections,
        symbols=[symbols_of(path) for path in snakemake.input.slices],
        weights=params.weights,
        seed=params.seed,
        target_sum=params.target_sum,
    )
    vectors, skipped = embed(method, given, f"then run again with --forcerun {snakemake.output[0]}")
    names = [section.name for section in sections]
    write(snakemake.output[0], method, snakemake.wildcards.dataset, names, vectors, skipped)

"""Rule `foreign_slice`: one slice's vectors by a method of others, in the form that our own encoders' have."""

from pathlib import Path

import numpy as np

from workflow.errors import DamagedFile
from workflow.foreign import FORMAT_VERSION
from workflow.reading import read_safetensors
from workflow.sealed import as_safetensors


def part(path: str | Path, slice: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of `embeddings/{method}/{slice}.safetensors` (docs/format.md), from the dataset's file.

    Where the method was skipped: X float32 [0, 0], spot int32 [0], and the reason as `skipped`.

    Raises
    ------
    DamagedFile
        Another version, or a file that lacks the slice.
    """
    found, about = read_safetensors(path)
    skipped = about.get("skipped", "")
    if about.get("format_version") != FORMAT_VERSION or not (skipped or slice in found):
        raise DamagedFile(
            slice=slice,
            file=str(path),
            found=f"format_version {about.get('format_version')}, slices {', '.join(sorted(found)) or 'none'}",
            expected=f"version {FORMAT_VERSION} and this slice",
            next_step=f"delete {path} and run again",
        )
    facts = {"format_version": "1", "slice": slice, "model": about["method"], "genes_used": "", "stride": "none"}
    facts |= {"simulated": "false"} | ({"skipped": skipped} if skipped else {})
    x = found.get(slice, np.empty((0, 0), np.float32))
    return {"X": x, "spot": np.arange(len(x), dtype=np.int32)}, facts


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    tensors, facts = part(snakemake.input[0], snakemake.wildcards.slice)
    Path(snakemake.output[0]).write_bytes(as_safetensors(tensors, facts))

"""Safetensors whose bytes depend on their content alone, sealed as those of the trainer are (`trainer/files.py`)."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save

from workflow.reading import BLANK


def as_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with its metadata in order (the library shuffles them) and `sha256` among them.

    That is of the whole file with zeros in the place of these 64 digits; `workflow.reading.read_safetensors` checks it.
    """
    raw = save(dict(tensors), {**metadata, "sha256": BLANK.decode()})
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begin at a multiple of 8
    blank = len(header).to_bytes(8, "little") + header + raw[end:]
    digest = hashlib.sha256(blank).hexdigest().encode()
    return blank.replace(b'"sha256":"%b"' % BLANK, b'"sha256":"%b"' % digest, 1)

"""Tar members whose bytes depend on name and data alone (no time, no owner), and where their data lie."""

from __future__ import annotations

import tarfile

BLOCK = 512
END = bytes(2 * BLOCK)  # closes an archive


def _template() -> bytearray:
    """A ustar header of an empty, nameless file: mode 644, owner 0, time 0."""
    header = bytearray(BLOCK)
    header[100:148] = b"0000644\0" + b"0000000\0" * 2 + b"00000000000\0" * 2
    header[148:156] = b" " * 8  # the checksum counts itself as spaces
    header[156:157] = tarfile.REGTYPE
    header[257:265] = tarfile.POSIX_MAGIC
    return header


_TEMPLATE = _template()
_SUM = sum(_TEMPLATE) - sum(_TEMPLATE[124:135])  # the size's digits are added for each file


def header(name: str, size: int) -> bytes:
    """Header of a regular file. A long name takes tarfile's GNU form; that of a short one is ten times faster here."""
    encoded = name.encode()
    if len(encoded) >= 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)
    block = _TEMPLATE.copy()
    block[: len(encoded)] = encoded
    block[124:135] = b"%011o" % size
    block[148:156] = b"%06o\0 " % (_SUM + sum(block[: len(encoded)]) + sum(block[124:135]))
    return bytes(block)


def sample(members: list[tuple[str, bytes]]) -> tuple[bytes, list[tuple[int, int]]]:
    """Members that lie together, as they stand in a tar.

    Parameters
    ----------
    members
        (name, data) of each.

    Returns
    -------
    bytes, spans
        A multiple of 512 bytes; (offset, size) of each member's data within them.
    """
    parts, spans, at = [], [], 0
    for name, data in members:
        head = header(name, len(data))
        parts += [head, data, bytes(-len(data) % BLOCK)]
        spans.append((at + len(head), len(data)))
        at += len(head) + len(data) + len(parts[-1])
    return b"".join(parts), spans

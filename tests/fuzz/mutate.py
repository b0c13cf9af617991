"""How good files are spoiled: bytes of any, and the structure of text, JSON, HDF5, npy, safetensors, tar and zip.

A mutation is a step (number of the operation, place between 0 and 1, payload); what doesn't apply leaves the file as it is.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

Step = tuple[int, float, str]

PAYLOADS = [
    *("", "0", "-1", "1", "2", "0.5", "1e308", "-1e308", "nan", "inf", "-inf", "65535", "65536", "4294967296"),
    *("9223372036854775807", "99999999999999999999999", "1" * 5000, "true", "null", "None", "NA"),
    *(
        "\0",
        "\ufeff",
        "\n",
        "\r\n",
        "\t",
        ",",
        '"',
        "\x1b[2J",
        "\u202e",
        "\U0001f9ec",
        "ÅÄÖ",
        "[" * 3000,
        '{"a":' * 3000,
    ),
    *(
        "../../evil",
        "/etc/evil",
        "C:\\evil",
        "a/../../evil",
        "evil.pkl",
        "%s%n",
        "=1+1",
        "__import__('os').system('x')",
    ),
    *(
        "!!python/object/apply:os.system ['x']",
        "&a [*a, *a]",
        "A" * 100_000,
        "-1-1" * 10_000,
        "1-Mar",
        "ENSG00000000003",
    ),
    *(
        "10x13",
        "10x1e9",
        "x",
        "barcode",
        "<html>",
        "%%MatrixMarket matrix array real general",
        "5000000000 5000000000 9",
    ),
]


class Bomb:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        import os

        return os.system, ("touch evil",)


def spoil(path: Path, steps: list[Step]) -> None:
    """Change one file in place: its structure first, for that needs a whole file, then its bytes."""
    data = path.read_bytes()
    operations = STRUCTURE.get(kind_of(path.name), []) + BYTES
    chosen = [(operations[number % len(operations)], where, payload) for number, where, payload in steps]
    for operation, where, payload in sorted(chosen, key=lambda step: step[0] in BYTES):
        try:
            data = operation(data, where, payload)
        except Exception:  # noqa: BLE001  (an operation that does not apply, whatever its library says of that)
            continue
    path.write_bytes(data)


def kind_of(name: str) -> str:
    """own (settings), json, h5, npy, safetensors, tar, zip or text."""
    name = name.removesuffix(".gz")
    known = {".h5ad": "h5", ".h5": "h5", ".json": "json", ".npy": "npy", ".safetensors": "safetensors", ".tar": "tar"}
    known |= {".zip": "zip", ".yaml": "own"}
    return known.get(Path(name).suffix, "text")


def at(n: int, where: float) -> int:
    return min(int(where * n), max(n - 1, 0))


# Bytes of anything.


def flip(data, where, payload):
    i = at(len(data), where)
    return data[:i] + bytes([data[i] ^ (1 << len(payload) % 8)]) + data[i + 1 :]


def overwrite(data, where, payload):
    i, new = at(len(data), where), payload.encode()[:200]
    return data[:i] + new + data[i + len(new) :]


def insert(data, where, payload):
    i = at(len(data), where)
    return data[:i] + payload.encode() + data[i:]


def truncate(data, where, payload):
    return data[: at(len(data), where)]


def repeat(data, where, payload):
    i = at(len(data), where)
    return data[:i] + data[i : i + 512] * 3 + data[i + 512 :]


def zeros(data, where, payload):
    i = at(len(data), where)
    return data[:i] + bytes(min(64, len(data) - i)) + data[i + 64 :]


def ones(data, where, payload):
    i = at(len(data), where)
    return data[:i] + b"\xff" * min(8, len(data) - i) + data[i + 8 :]


BYTES = [flip, overwrite, insert, truncate, repeat, zeros, ones]


# Text, gzipped or not.


def of_text(change: Callable[[str, float, str], str]):
    def operation(data, where, payload):
        packed = data[:2] == b"\x1f\x8b"
        text = (gzip.decompress(data) if packed else data).decode()
        changed = change(text, where, payload).encode()
        return gzip.compress(changed, 1) if packed else changed

    return operation


def change_number(text, where, payload):
    found = list(re.finditer(r"-?\d+(\.\d+)?", text))
    match = found[at(len(found), where)]
    return text[: match.start()] + payload + text[match.end() :]


def change_head(text, where, payload):
    """As `change_number`, among the first ten: headers and sizes stand there."""
    found = list(re.finditer(r"[^\s,]+", text[:2000]))[:10]
    match = found[at(len(found), where)]
    return text[: match.start()] + payload + text[match.end() :]


def insert_text(text, where, payload):
    i = at(len(text), where)
    return text[:i] + payload + text[i:]


def drop_line(text, where, payload):
    lines = text.splitlines(keepends=True)
    del lines[at(len(lines), where)]
    return "".join(lines)


def double_line(text, where, payload):
    lines = text.splitlines(keepends=True)
    i = at(len(lines), where)
    return "".join([*lines[: i + 1], *lines[i:]])


def drop_field(text, where, payload):
    """One column less in every line."""
    lines = [re.split(r"([\t,])", line) for line in text.splitlines()]
    cut = 2 * at(len(lines[0]) // 2 + 1, where)
    return "\n".join("".join(line[:cut] + line[cut + 2 :]) for line in lines) + "\n"


def exchange_fields(text, where, payload):
    """Two neighbouring columns of every line."""
    lines = [re.split(r"([\t, ])", line) for line in text.splitlines()]
    i = 2 * at(len(lines[0]) // 2, where)
    for line in lines:
        if len(line) > i + 2:
            line[i], line[i + 2] = line[i + 2], line[i]
    return "\n".join("".join(line) for line in lines) + "\n"


def bomb(text, where, payload):
    return text + "0" * (40 << 20)


TEXT = [of_text(f) for f in (change_number, change_head, insert_text, drop_line, double_line, drop_field)]
TEXT += [of_text(f) for f in (exchange_fields, change_number, change_head, bomb)]


# JSON.

VALUES = [None, True, -1, 0, 1, 1e308, 2**70, "", "../../evil", [], {}, [[]], {"a": 1}, "x" * 10_000, [0] * 100]


def change_leaf(data, where, payload):
    packed = data[:2] == b"\x1f\x8b"
    tree = json.loads(gzip.decompress(data) if packed else data)
    places = []

    def walk(node):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            walk(value)

    walk(tree)
    node, key = places[at(len(places), where)]
    value = (VALUES + [float("nan"), float("inf"), payload])[len(payload) * 7 % (len(VALUES) + 3)]
    if len(payload) == 1 and isinstance(node, dict):
        del node[key]
    else:
        node[key] = value
    text = json.dumps(tree).encode()
    return gzip.compress(text, 1) if packed else text


# HDF5.


def of_h5(change: Callable[[h5py.File, h5py.Dataset, str], None]):
    def operation(data, where, payload):
        held = io.BytesIO(data)
        with h5py.File(held, "r+") as file:
            names: list[str] = []
            file.visititems(lambda name, found: names.append(name) if isinstance(found, h5py.Dataset) else None)
            change(file, file[names[at(len(names), where)]], payload)
        return held.getvalue()

    return operation


def put(dataset: h5py.Dataset, **given) -> None:
    """Another dataset of the same name and attributes."""
    group, name, attributes = dataset.parent, dataset.name, dict(dataset.attrs)
    del group[name]
    group.create_dataset(name, **given).attrs.update(attributes)


def link_elsewhere(file, dataset, payload):
    group, name = dataset.parent, dataset.name
    del group[name]
    group[name] = h5py.ExternalLink("../secret.h5", payload or "/data")


def store_elsewhere(file, dataset, payload):
    put(dataset, shape=(100,), dtype="i4", external=[("/etc/hostname", 0, 400)])


def virtual(file, dataset, payload):
    group, name = dataset.parent, dataset.name
    layout = h5py.VirtualLayout(shape=(100,), dtype="i4")
    layout[:] = h5py.VirtualSource("../secret.h5", "data", shape=(100,))
    del group[name]
    group.create_virtual_dataset(name, layout)


def soft_circle(file, dataset, payload):
    dataset.parent["again"] = h5py.SoftLink("/")


def hard_circle(file, dataset, payload):
    dataset.parent["again"] = file["/"]


def doubling(file, dataset, payload):
    group = dataset.parent
    for _ in range(40):
        group["a"] = h5py.SoftLink(group.name + "/b")
        group = group.create_group("b")


def huge(file, dataset, payload):
    shape = tuple(max(n, 1) * 2**36 for n in dataset.shape[:1]) + dataset.shape[1:]
    put(dataset, shape=shape, dtype=dataset.dtype, chunks=True)


def swollen(file, dataset, payload):
    put(dataset, data=np.zeros(8 << 20, np.uint8), compression="gzip")


def other_dtype(file, dataset, payload):
    dtypes = ("f8", "f4", "i1", "u1", "i8", "u8", "c16", "?", "S5", "f2")
    put(dataset, data=dataset[()].astype(dtypes[len(payload) % len(dtypes)]))


def objects(file, dataset, payload):
    put(dataset, data=[payload.replace("\0", "0")] * max(len(dataset), 1), dtype=h5py.string_dtype())


def other_shape(file, dataset, payload):
    values = dataset[()]
    forms = (values.ravel()[:0], values.ravel()[:1], values[None], values.ravel()[:-1], values.ravel()[0])
    put(dataset, data=forms[len(payload) % len(forms)])


def drop(file, dataset, payload):
    del dataset.parent[dataset.name]


def change_value(file, dataset, payload):
    values = dataset[()].ravel()
    new = payload[:20].encode() if values.dtype.kind in "SO" else float(payload)
    if values.dtype.kind in "iu" and not (np.isfinite(new) and new in (0, 1, 2, 65535, 65536)):
        values = values.astype(float)
    values[len(payload) % len(values)] = new
    put(dataset, data=values.reshape(dataset.shape))


def other_attribute(file, dataset, payload):
    owner = dataset if len(payload) % 2 else dataset.parent
    name = list(owner.attrs)[len(payload) % len(owner.attrs)]
    owner.attrs[name] = payload.replace("\0", "0")


H5 = [link_elsewhere, store_elsewhere, virtual, soft_circle, hard_circle, doubling, huge, swollen]
H5 += [other_dtype, objects, other_shape, drop, change_value, change_value, other_attribute]


# npy and safetensors.


def pickled(data, where, payload):
    out = io.BytesIO()
    np.save(out, np.array([Bomb()], dtype=object), allow_pickle=True)
    return out.getvalue()


def bare_pickle(data, where, payload):
    return pickle.dumps(Bomb())


def lie_in_header(data, where, payload):
    """The header's own numbers and words, its length kept as it is where that is part of the lie."""
    digits = list(re.finditer(rb"\d+|<u\d|\w+", data[:128]))
    match = digits[at(len(digits), where)]
    return data[: match.start()] + payload.encode()[:40] + data[match.end() :]


def other_array(data, where, payload):
    out, array = io.BytesIO(), np.load(io.BytesIO(data), allow_pickle=False)
    fields = array.dtype.names
    name = fields[at(len(fields), where)]
    limits = np.iinfo(array.dtype[name])
    array[name][len(payload) % len(array)] = (0, 1, limits.max, limits.max // 2, 3)[len(payload) % 5]
    np.save(out, array)
    return out.getvalue()


def other_header(data, where, payload):
    (length,) = struct.unpack("<Q", data[:8])
    header = change_leaf(data[8 : 8 + length], where, payload)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def other_length(data, where, payload):
    return struct.pack("<Q", (0, 1, 7, 2**31, 2**63, 100)[len(payload) % 6]) + data[8:]


# Archives.

EVIL = ("../../evil", "/tmp/evil", "a/../../evil", "evil.pkl", "./evil", "CON", "\\\\evil", "x" * 300, "a\nb")


def of_tar(change):
    def operation(data, where, payload):
        packed = data[:2] == b"\x1f\x8b"
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar if member.isfile()]
        change(members, where, payload)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz" if packed else "w", format=tarfile.GNU_FORMAT) as tar:
            for member, content in members:
                tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
        return out.getvalue()

    return operation


def add_member(members, where, payload):
    member = tarfile.TarInfo(EVIL[len(payload) % len(EVIL)])
    kinds = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    member.type, member.linkname = kinds[at(len(kinds), where)], "/etc/passwd"
    content = pickle.dumps(Bomb())
    member.size = len(content) if member.isreg() else 0
    members.insert(at(len(members), where), (member, content))


def rename_member(members, where, payload):
    members[at(len(members), where)][0].name = EVIL[len(payload) % len(EVIL)]


def double_member(members, where, payload):
    members.append(members[at(len(members), where)])


def change_member(members, where, payload):
    i = at(len(members), where)
    member, content = members[i]
    content = spoiled(content, member.name, len(payload), payload)
    member.size = len(content)
    members[i] = (member, content)


def spoiled(content: bytes, name: str, number: int, payload: str) -> bytes:
    operations = STRUCTURE.get(kind_of(name), []) + BYTES
    return operations[number % len(operations)](content, (number % 97) / 97, payload)


def change_zip(data, where, payload):
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = [(info.filename, file.read(info)) for info in file.infolist()]
    i, out = at(len(members), where), io.BytesIO()
    name = EVIL[len(payload) % len(EVIL)]
    members[i] = (name, members[i][1]) if len(payload) % 2 else (members[i][0], b"\0" * (30 << 20))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return out.getvalue()


STRUCTURE = {
    "own": TEXT[:-1],  # a user's own settings; nobody's are 40 MB
    "text": TEXT,
    "json": [change_leaf] * 4 + TEXT[:3],
    "h5": [of_h5(change) for change in H5],
    "npy": [pickled, bare_pickle, lie_in_header, other_array, other_array, other_array],
    "safetensors": [other_header, other_header, other_length, bare_pickle],
    "tar": [of_tar(change) for change in (add_member, rename_member, double_member, change_member, change_member)],
    "zip": [change_zip, change_zip],
}

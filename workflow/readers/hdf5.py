"""What an HDF5 file may do to whoever reads it, looked for before anything of it is read."""

from __future__ import annotations

from pathlib import Path

import h5py

from workflow.errors import UnsafeHdf5

LARGEST_RATIO = 1100  # of declared to stored bytes of a dataset; deflate comes to 1,032 at most
ALWAYS_FINE = 1 << 24  # bytes of all datasets, whatever the ratio


def vet(slice: str, path: Path) -> None:
    """Refuse an HDF5 file whose reading would touch other files, run in a circle, or take more memory than its size explains.

    Only the structure is looked at, every link of it by itself. A link that HDF5 has no name for, and anything that is broken,
    ends in the library's own error.

    Raises
    ------
    UnsafeHdf5
        External links, datasets with external storage, virtual datasets; a group that can be reached in two ways (a circle
        would never end, and doubling it thirty times over would not either); datasets that declare much more than is stored.
    """

    def refuse(found: str, expected: str) -> UnsafeHdf5:
        return UnsafeHdf5(
            slice=slice,
            file=str(path),
            found=found,
            expected=expected,
            next_step="look at where the file comes from; if you trust it, write it anew with anndata (read_h5ad, write_h5ad)",
        )

    def size_of(dataset: h5py.Dataset) -> tuple[int, int]:
        """Bytes that it declares, and bytes that it stores."""
        if dataset.is_virtual or dataset.external:
            raise refuse(f"{dataset.name}, whose data lie in other files", "all data in the file itself")
        return dataset.size * dataset.dtype.itemsize if dataset.size else 0, dataset.id.get_storage_size()

    def group_id(group: h5py.Group) -> int:
        return h5py.h5o.get_info(group.id).addr

    unstored = 0
    with h5py.File(path, "r") as file:
        groups, seen, soft = [file["/"]], {group_id(file["/"])}, []
        while groups:
            group = groups.pop()
            for name in group:
                link = group.get(name, getlink=True)
                if isinstance(link, h5py.ExternalLink):
                    raise refuse(
                        f"{group.name.rstrip('/')}/{name}, a link to the file {link.filename}",
                        "all data in the file itself",
                    )
                if isinstance(link, h5py.SoftLink):
                    soft.append((group, name))
                    continue
                target = group[name]
                if isinstance(target, h5py.Group):
                    if group_id(target) in seen:
                        raise refuse(f"the group {target.name} in two places", "each group once")
                    seen.add(group_id(target))
                    groups.append(target)
                elif isinstance(target, h5py.Dataset):
                    declared, stored = size_of(target)
                    unstored += max(0, declared - LARGEST_RATIO * stored)
        for group, name in soft:  # now it is known that none leads through another file
            target = group.get(name)
            if isinstance(target, h5py.Group):
                raise refuse(f"the group {target.name} in two places, one of them a soft link", "each group once")
            if isinstance(target, h5py.Dataset):
                declared, stored = size_of(target)
                unstored += max(0, declared - LARGEST_RATIO * stored)
    if unstored > ALWAYS_FINE:
        raise refuse(
            f"datasets that declare {unstored} bytes more than what is stored of them can unpack to",
            "as much data as is declared",
        )

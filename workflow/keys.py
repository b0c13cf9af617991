"""Names of the fields in a curated slice's AnnData, in one place."""


class Keys:
    """Fields of ``results/slices/{slice}.h5ad`` (docs/format.md, curated slice)."""

    ARRAY_ROW = "array_row"  # obs, int32: row of the capture lattice
    ARRAY_COL = "array_col"  # obs, int32: column of the capture lattice; on Visium row + col is even
    TOTAL_COUNTS = "total_counts"  # obs, int64: counts over all 'Gene Expression' features of the source
    LABEL = "label"  # obs, categorical: the source's domain label, where it has one
    SPATIAL = "spatial"  # obsm, float64 [n_spots, 2]: full-resolution pixels (x, y)
    EMBEDDING = "X_stpatch"  # obsm, float32 [n_spots, d]
    SYMBOL = "symbol"  # var
    STPATCH = "stpatch"  # uns: provenance
    QUARANTINE = "quarantine"  # uns["stpatch"]: why a slice was rejected

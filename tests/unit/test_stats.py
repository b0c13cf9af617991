"""Gene statistics, on tiny simulated slices."""

import itertools

import numpy as np
import pytest

from workflow.expression import log_normalise
from workflow.grid import make_grid
from workflow.moments import moments, write_moments
from workflow.simulate import tiny_slice
from workflow.stats import merge_moments, read_vocabulary, write_vocabulary

SLICES = [
    tiny_slice(seed=0, n_genes=1030, name="a"),  # more than one block of genes
    tiny_slice(seed=1, n_genes=50, gene_offset=20, name="b"),
    tiny_slice(seed=2, n_genes=40, kind="square", name="c"),
]


def loaded(adata, path):
    """Moments of a slice as `stats` reads them."""
    grid = make_grid(adata, "auto", 100)
    write_moments(path, grid.gene_ids, adata.var["symbol"], moments(grid, 1e4))
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moments")
    return [loaded(adata, folder / f"{i}.npz") for i, adata in enumerate(SLICES)]


def test_mean_and_variance_are_those_of_all_spots_pooled(parts):
    vocabulary = merge_moments(parts)
    values = [log_normalise(a.X.toarray(), a.obs["total_counts"].to_numpy()[:, None], 1e4) for a in SLICES]
    for i, gene in enumerate(vocabulary.gene_id):
        measured = [v[:, a.var_names.get_loc(gene)] for a, v in zip(SLICES, values, strict=True) if gene in a.var_names]
        pooled = np.concatenate(measured)
        assert (vocabulary.n_slices[i], vocabulary.n_spots[i]) == (len(measured), len(pooled))
        np.testing.assert_allclose(vocabulary.mean[i], pooled.mean(), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(vocabulary.variance[i], pooled.var(), rtol=1e-10, atol=1e-15)


def test_the_vocabulary_is_every_gene_of_any_slice_sorted(parts):
    vocabulary = merge_moments(parts)
    assert vocabulary.gene_id == sorted(set().union(*(a.var_names for a in SLICES)))
    assert vocabulary.symbol[25] == "SIM25"


def test_the_order_of_slices_changes_no_byte(parts, tmp_path):
    tables = set()
    for order in itertools.permutations(parts):
        write_vocabulary(merge_moments(list(order)), tmp_path / "genes.tsv")
        tables.add((tmp_path / "genes.tsv").read_bytes())
    assert len(tables) == 1


def test_a_vocabulary_reads_back_to_the_last_bit(parts, tmp_path):
    vocabulary = merge_moments(parts)
    write_vocabulary(vocabulary, tmp_path / "genes.tsv")
    again = read_vocabulary(tmp_path / "genes.tsv")
    assert (again.gene_id, again.symbol) == (vocabulary.gene_id, vocabulary.symbol)
    for name in ("n_slices", "n_spots", "mean", "variance"):
        np.testing.assert_array_equal(getattr(again, name), getattr(vocabulary, name))
    assert (tmp_path / "genes.tsv").read_text().splitlines()[:2] == [
        "# stpatch genes 1",
        "index\tgene_id\tsymbol\tn_slices\tn_spots\tmean\tvariance",
    ]


def test_the_most_frequent_symbol_of_a_gene_is_kept():
    def part(symbol):
        return {"gene_ids": ["g"], "symbols": [symbol], "n_spots": 2, "sum": [1.0], "m2": [0.5]}

    def symbol(*names):
        return merge_moments([part(name) for name in names]).symbol

    assert symbol("NEW", "OLD", "NEW") == ["NEW"]
    assert symbol("B", "A") == symbol("A", "B") == ["A"]
    assert symbol("", "A", "") == ["A"]
    assert symbol("") == [""]


def test_without_training_slices_the_vocabulary_is_empty(tmp_path):
    write_vocabulary(merge_moments([]), tmp_path / "genes.tsv")
    assert read_vocabulary(tmp_path / "genes.tsv").gene_id == []


def test_another_version_of_the_table_is_refused(tmp_path):
    (tmp_path / "genes.tsv").write_text("# stpatch genes 2\nindex\n")
    with pytest.raises(ValueError, match=r"genes\.tsv.*# stpatch genes 1"):
        read_vocabulary(tmp_path / "genes.tsv")

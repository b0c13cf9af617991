"""A method of others, by its real package, on two real cortex sections."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from tests.unit.simulated import GENE_TABLES
from workflow import foreign
from workflow.controls import load_section
from workflow.curate import curate, write_slice
from workflow.foreign_methods import Given

pytestmark = pytest.mark.real


@pytest.mark.filterwarnings("default")
def test_banksy_carries_cortical_layers_from_one_section_to_the_next(real_data, tmp_path):
    pytest.importorskip("banksy")
    paths = []
    for name in ("151673", "151674"):
        row = {
            "slice": name,
            "source": "file",
            "format": "h5ad",
            "organism": "human",
            "labels": "",
            "label_column": "layer",
        }
        row |= {"url": str(real_data / f"visium/dlpfc_{name}_crop_allgenes.h5ad")}
        paths.append(tmp_path / f"{name}.h5ad")
        write_slice(curate(row, GENE_TABLES), paths[-1])
    sections = [load_section(path) for path in paths]
    vectors, skipped = foreign.embed("banksy", Given(sections, [foreign.symbols_of(path) for path in paths]), "x")
    assert skipped == ""
    labelled = [np.array([label is not None for label in section.labels]) for section in sections]
    train, test = ((x[of], s.labels[of].astype(str)) for x, s, of in zip(vectors, sections, labelled, strict=True))
    assert train[0].shape[1] == 20
    most = max(np.mean(test[1] == label) for label in set(test[1]))
    accuracy = KNeighborsClassifier(10).fit(*train).score(*test)
    assert most < 0.35
    assert accuracy > 0.7

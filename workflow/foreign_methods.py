"""Encoders and baselines of others, each called as its authors do: from sections to one vector a spot.

Their packages are no dependencies: what can't be imported, or has no weights, raises `Absent` with the reason. None is imported
before it is asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA

from workflow.controls import N_VARIABLE, Section, common_genes, most_variable, normalised, principal_components


class Absent(Exception):
    """A method can't run here, because its package, its weights or a GPU is absent, or because of the organism: says which."""


@dataclass
class Given:
    """What a method gets.

    Attributes
    ----------
    sections
        All sections of a dataset, in the order of their names.
    symbols
        Gene symbols of each section, object [k]; "" where unknown.
    weights
        Folder of its pretrained weights; "" where the config names none.
    seed
        Of whatever the method draws.
    target_sum
        Counts to which spots are scaled, where the normalisation is ours.
    """

    sections: list[Section]
    symbols: list[np.ndarray]
    weights: str = ""
    seed: int = 0
    target_sum: float = 1e4


def package(name: str, where: str) -> ModuleType:
    """A module of a package that may be absent, or that may not fit what else is installed."""
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError, OSError) as error:  # names or shared libraries of another version
        raise Absent(f"{name} can't be imported ({error}); {where}") from error


def weights(given: Given, method: str, *files: str) -> Path:
    """The folder of pretrained weights, if it holds these files."""
    if not given.weights:
        raise Absent(f"no weights: set evaluate.foreign_weights.{method} to the folder that holds {', '.join(files)}")
    folder = Path(given.weights)
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise Absent(f"weights incomplete: {folder} lacks {', '.join(missing)}")
    return folder


def human(given: Given, method: str) -> None:
    """Refuse genes of another organism: the vocabulary is human."""
    if not all(str(section.genes[0]).startswith("ENSG") for section in given.sections if len(section.genes)):
        raise Absent(f"{method} knows human genes alone")


def seeded(given: Given) -> None:
    """Set every global generator: most of these packages draw from them. torch's, once a package has loaded it."""
    random.seed(given.seed)
    np.random.seed(given.seed)  # noqa: NPY002  (theirs)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(given.seed)


def table_of(section: Section, symbols: np.ndarray) -> anndata.AnnData:
    """Raw counts (float32 CSR) under gene symbols, the first column of each symbol; ids in var, micrometres in obsm."""
    kept = np.flatnonzero((symbols != "") & ~pd.Index(symbols).duplicated())
    return anndata.AnnData(
        X=sparse.csr_matrix(section.counts[:, kept], dtype=np.float32),
        obs=pd.DataFrame(index=pd.Index([f"spot{i}" for i in range(section.n_spots)])),
        var=pd.DataFrame({"ensembl_id": section.genes[kept]}, index=pd.Index(symbols[kept])),
        obsm={"spatial": np.asarray(section.position, dtype=np.float64)},
    )


@contextmanager
def one_worker() -> Iterator[None]:
    """scGPT asks how many cores there are, and draws its genes in as many processes: with one, the result doesn't depend on it."""
    asked = os.sched_getaffinity
    os.sched_getaffinity = lambda pid: {0}
    try:
        yield
    finally:
        os.sched_getaffinity = asked


def scgpt(given: Given) -> list[np.ndarray]:
    """scGPT (bowang-lab/scGPT), zero-shot: the <cls> embedding of each spot's raw counts, of unit length."""
    return _scgpt(given, "scgpt", "pip install scgpt with torch 2.3 and torchtext 0.18")


def scgpt_spatial(given: Given) -> list[np.ndarray]:
    """scGPT-spatial (bowang-lab/scGPT-spatial), zero-shot, as scGPT; it has statistics of genes beside its weights."""
    where = "put a checkout of bowang-lab/scGPT-spatial on PYTHONPATH, with the packages of scGPT"
    return _scgpt(given, "scgpt_spatial", where, "all_dict_mean_std.csv")


def _scgpt(given: Given, name: str, where: str, *further: str) -> list[np.ndarray]:
    human(given, name)
    folder = weights(given, name, "args.json", "best_model.pt", "vocab.json", *further)
    tasks = package(f"{name}.tasks", where)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vectors = []
    for section, symbols in zip(given.sections, given.symbols, strict=True):
        seeded(given)
        table = table_of(section, symbols)
        table = table[:, table.var_names.isin(vocabulary)].copy()
        table.X = table.X.toarray()
        with one_worker():
            done = tasks.embed_data(
                table, folder, gene_col="index", batch_size=64, use_fast_transformer=False, return_new_adata=False
            )
        vectors.append(done.obsm["X_scGPT"])
    return vectors


def stofm(given: Given) -> list[np.ndarray]:
    """SToFM (PharMolix/SToFM): 256 values a spot, by the script of its checkout, which wants a CUDA GPU.

    The folder of weights is a checkout with `ckpt/` in it, as its authors unpack theirs. A slice is tokenised by the geneformer of
    the checkout: genes ranked by count over total over the gene's median.
    """
    human(given, "stofm")
    encoder, head, model = "ckpt/cell_encoder/cell_bert", "ckpt/cell_encoder/cell_proj.bin", "ckpt/se2transformer.pth"
    folder = weights(given, "stofm", "get_embeddings.py", "ckpt/config.json", encoder, head, model).resolve()
    where = f"install the requirements of {folder}, geneformer 0.0.1 of the checkout among them"
    tokenizer = package("geneformer.tokenizer", where)
    for name in ("transformers", "datasets", "rapids_singlecell", "cupy"):
        package(name, where)
    vectors = []
    with tempfile.TemporaryDirectory() as scratch:
        for section, symbols in zip(given.sections, given.symbols, strict=True):
            place = Path(scratch, section.name)
            place.mkdir()
            _tokenise(tokenizer, table_of(section, symbols), place)
            command = [sys.executable, "get_embeddings.py", f"--data_path={place}", f"--seed={given.seed}"]
            command += [
                f"--cell_encoder_path={folder / 'ckpt/cell_encoder'}",
                f"--config_path={folder / 'ckpt/config.json'}",
            ]
            command += [f"--model_path={folder / model}", "--output_filename=stofm_emb.npy"]
            subprocess.run(command, cwd=folder, stdout=sys.stderr, check=True)
            vectors.append(np.load(place / "stofm_emb.npy", allow_pickle=False))
    return vectors


def _tokenise(tokenizer: ModuleType, table: anndata.AnnData, place: Path) -> None:
    """Write `hf.dataset` and `data.h5ad` of a slice, as SToFM's preprocessing does."""
    words = tokenizer.TranscriptomeTokenizer({}, nproc=1)
    totals = np.asarray(table.X.sum(axis=1)).ravel()
    coding = np.array([bool(words.genelist_dict.get(gene, False)) for gene in table.var["ensembl_id"]])
    ids = table.var["ensembl_id"].to_numpy()[coding]
    tokens = np.array([words.gene_token_dict[gene] for gene in ids])
    median = np.array([words.gene_median_dict[gene] for gene in ids])
    counts = table.X[:, coding].tocsr()
    cells = [
        tokenizer.tokenize_cell(counts[[i]].toarray()[0] / max(totals[i], 1) * 1e4 / median, tokens)
        for i in range(table.n_obs)
    ]
    words.create_dataset(cells, None).save_to_disk(str(place / "hf.dataset"))
    table.write_h5ad(place / "data.h5ad")


def novae(given: Given) -> list[np.ndarray]:
    """Novae (prism-oncology/novae), zero-shot: the latent of each spot's neighbourhood on the graph of the capture lattice."""
    folder = weights(given, "novae", "config.json", "model.safetensors")
    theirs = package("novae", "pip install novae")
    tables = [table_of(section, symbols) for section, symbols in zip(given.sections, given.symbols, strict=True)]
    for section, table in zip(given.sections, tables, strict=True):
        technology = "visium" if section.lattice == "staggered" else None
        theirs.spatial_neighbors(table, technology=technology)
    seeded(given)
    model = theirs.Novae.from_pretrained(str(folder))
    model.compute_representations(tables, zero_shot=True, accelerator="auto", num_workers=0)
    return [table.obsm["novae_latent"] for table in tables]


BANKSY_NEIGHBOURS, BANKSY_LAMBDA, BANKSY_COMPONENTS = 6, 0.2, 20


def banksy(given: Given) -> list[np.ndarray]:
    """BANKSY (prabhakarlab/Banksy_py) with its authors' settings for several cortex sections: 6 neighbours, lambda .2, no gradient.

    Each section's matrix (own and neighbours' expression, z-scored) is the package's; then 20 principal components of all together.
    The genes are those of `pca`.
    """
    where = "pip install pybanksy"
    graphs, matrices = package("banksy.initialize_banksy", where), package("banksy.embed_banksy", where)
    own = []
    for section, expression in zip(given.sections, _variable(given), strict=True):
        table = anndata.AnnData(
            X=expression.toarray(), obsm={"spatial": np.asarray(section.position, dtype=np.float64)}
        )
        graph = graphs.initialize_banksy(
            table, ("x", "y", "spatial"), BANKSY_NEIGHBOURS, nbr_weight_decay="scaled_gaussian", max_m=0,
            plt_edge_hist=False, plt_nbr_weights=False, plt_agf_angles=False, plt_theta=False,
        )  # fmt: skip
        _, matrix = matrices.generate_banksy_matrix(table, graph, [BANKSY_LAMBDA], max_m=0, verbose=False)
        own.append(np.nan_to_num(np.asarray(matrix.X, dtype=np.float32)))  # a gene that nobody has is NaN when z-scored
    together = np.concatenate(own)
    n = min(BANKSY_COMPONENTS, *together.shape)
    reduced = PCA(n, svd_solver="covariance_eigh").fit_transform(together)
    return np.split(reduced, np.cumsum([len(x) for x in own])[:-1])


SPAGCN_SHARE, SPAGCN_EPOCHS, SPAGCN_DOMAINS = 0.5, 200, 10


def spagcn(given: Given) -> list[np.ndarray]:
    """SpaGCN (jianhuupenn/SpaGCN) without histology: what its graph convolution makes of the components of `pca`.

    It wants a dense matrix of distances, so it is trained on the section with most spots and applied to the others. Neighbours weigh
    half (its authors' `p`); it starts from k-means with as many domains as the dataset has labels.
    """
    theirs = package("SpaGCN", "pip install SpaGCN")
    components = principal_components(_variable(given))
    seeded(given)
    domains = len({label for section in given.sections for label in section.labels} - {None}) or SPAGCN_DOMAINS
    first = int(np.argmax([section.n_spots for section in given.sections]))
    near = [_near(theirs, section) for section in given.sections]
    n = components[first].shape[1]
    model = theirs.models.simple_GC_DEC(n, n)
    model.fit(
        components[first], near[first], lr=0.005, max_epochs=SPAGCN_EPOCHS, weight_decay=0, opt="admin",
        init="kmeans", n_clusters=domains, init_spa=True, tol=5e-3,
    )  # fmt: skip
    return [model.predict(x, of)[0].detach().numpy() for x, of in zip(components, near, strict=True)]


def _near(theirs: ModuleType, section: Section) -> np.ndarray:
    """Weight of each spot in each other's neighbourhood, float32 [n, n]: a Gaussian as wide as `search_l` finds."""
    x, y = section.position.T
    distance = theirs.calculate_adj_matrix(x.tolist(), y.tolist(), histology=False)
    width = theirs.search_l(SPAGCN_SHARE, distance, start=0.01, end=float(distance.max()), tol=0.01, max_run=100)
    if width is None:
        raise ValueError(
            f"spagcn on slice {section.name}: found no width at which neighbours weigh {SPAGCN_SHARE}; expected spots with "
            "neighbours. Next step: take spagcn out of evaluate.foreign."
        )
    return np.exp(-(distance**2) / (2 * width**2))


def _variable(given: Given) -> list[sparse.csr_matrix]:
    """Normalised expression of the genes of `pca`, CSR [n_spots, 2000] a section."""
    genes = common_genes(given.sections)
    expression = [normalised(section, genes, given.target_sum) for section in given.sections]
    columns = most_variable(expression, N_VARIABLE)
    return [matrix[:, columns] for matrix in expression]


METHODS: dict[str, Callable[[Given], list[np.ndarray]]] = {
    "scgpt": scgpt,
    "scgpt_spatial": scgpt_spatial,
    "stofm": stofm,
    "novae": novae,
    "banksy": banksy,
    "spagcn": spagcn,
}

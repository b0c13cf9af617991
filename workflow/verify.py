"""Check what a run has left, and say what to delete to have it rebuilt: ``python -m workflow.verify results/ [--jobs N]``.

Every file is held against the sizes and hashes recorded for it, against what its format promises, and against the files that it
was made from: a grid against its curated slice, a whole slice against its grid, an annotated slice against its embedding.
One line a problem, then how many; the exit code is 1 where there was one. Nothing is changed. docs/reliability.md lists
what can't be seen. Not while a run is building in the folder: half-written files would be reported.
"""

import argparse
import json
import shlex
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import anndata
import numpy as np
from numcodecs import blosc

from workflow import tar
from workflow.admit import DUPLICATES, NOTES, QUARANTINE, read_curated
from workflow.catalogue import columns
from workflow.codec import decode
from workflow.errors import SliceError
from workflow.grid import ARRAYS, Grid, make_grid, read_grid
from workflow.keys import Keys
from workflow.reading import read_safetensors, seal_holds
from workflow.regions import read_regions
from workflow.shards import SAMPLE_DTYPE, canonical_sha256, permutation
from workflow.sketch import read_sketch
from workflow.sources import sha256_of
from workflow.stats import read_vocabulary
from workflow.whole import whole_slice

VERSION = 1  # of every format here
SPLITS = ("train", "val")
TRAIN = Path("shards/train/index.json")
TABLES = {"admitted": None, "quarantine": QUARANTINE, "duplicates": DUPLICATES, "notes": NOTES}


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be, and the paths to delete so that it is made again."""

    file: Path
    found: str
    expected: str
    remove: tuple[Path, ...]

    def __str__(self) -> str:
        command = shlex.join(["rm", "-r", *map(str, self.remove)])
        line = f"{self.file}: found {self.found}; expected {self.expected}. Next step: {command}; then run again"
        return " ".join(line.split())


Findings = Iterator[Problem]
Check = Callable[[], Iterable[Problem]]


def unless(right: bool, file: Path, found: object, expected: object, *remove: Path) -> Findings:
    """A problem, unless all is right."""
    if not right:
        yield Problem(file, str(found), str(expected), remove or (file,))


def same(file: Path, what: str, found: object, expected: object, *remove: Path) -> Findings:
    """A problem where two things differ."""
    yield from unless(found == expected, file, f"{what} {found}", f"{what} {expected}", *remove)


def grid_at(path: Path) -> Grid | None:
    """A grid to compare others with; None where it is not there or damaged, which its own check tells."""
    try:
        return read_grid(path)
    except ValueError:
        return None


def trained_on(results: Path) -> dict:
    """The index of the training shards; nothing where it is not there or damaged, which its own check tells."""
    try:
        return json.loads((results / TRAIN).read_text())
    except (OSError, ValueError):
        return {}


def same_as_copy(path: Path, results: Path, part: str, *remove: Path) -> Findings:
    """A file against the training shards' copy of it, where that is the one that their index names."""
    entry = trained_on(results).get(part)
    if entry and entry["sha256"] == sha256_of(results / TRAIN.parent / entry["file"]):
        yield from same(path, "sha256", sha256_of(path), entry["sha256"], *remove)


def sealed(path: Path) -> Findings:
    """A file that carries its own sha256 against that."""
    yield from unless(seal_holds(path.read_bytes()) is not False, path, "other bytes", "those of its own sha256")


# ---- one check a kind of file; what a reader raises on the way is a finding too (`findings`)


def check_slice(path: Path) -> Findings:
    """A curated slice: its seal, readable to the last chunk, and as docs/format.md says."""
    yield from sealed(path)
    slice_ = anndata.read_h5ad(path)
    facts, X = slice_.uns[Keys.STPATCH], slice_.X
    yield from same(path, "format_version", int(facts["format_version"]), VERSION)
    yield from same(path, "slice", str(facts["slice"]), path.stem)
    if Keys.QUARANTINE in facts:
        yield from same(path, "shape of a rejected slice", slice_.shape, (0, 0))
        return
    yield from same(path, "X of type", (type(X).__name__, str(X.dtype)), ("csr_matrix", "int32"))
    X.check_format(full_check=True)
    totals = slice_.obs[Keys.TOTAL_COUNTS].to_numpy()
    yield from unless(X.nnz == 0 or X.data.min() >= 0, path, "a negative count", "counts")
    fewer = totals < np.asarray(X.sum(axis=1, dtype=np.int64)).ravel()
    yield from unless(not fewer.any(), path, f"{fewer.sum()} spots whose total is less than their counts", "none")
    for axis, names in {"spots": slice_.obs_names, "genes": slice_.var_names}.items():
        yield from unless(names.is_unique, path, f"{axis} of one name", f"unique names of {axis}")
    kept = {name: int(facts["counts"][name]) for name in ("spots_in_tissue", "genes_kept")}
    yield from same(path, "spots and genes", slice_.shape, tuple(kept.values()))
    pixels = np.asarray(slice_.obsm[Keys.SPATIAL])
    yield from unless(np.isfinite(pixels).all(), path, "positions that are not finite", "pixels")


def check_archive(path: Path) -> Findings:
    """An npz: every member against its CRC."""
    with zipfile.ZipFile(path) as file:
        yield from unless(not (bad := file.testzip()), path, f"member {bad} with another CRC", "the recorded CRC")


def check_sketch(path: Path) -> Findings:
    yield from check_archive(path)
    yield from same(path, "slice", read_sketch(path).slice, path.stem)


def check_grid(path: Path, results: Path) -> Findings:
    """A grid against its checksums, its own map, and the curated slice; of these two the one without a checksum is to blame."""
    grid = read_grid(path)
    yield from same(path, "slice", grid.slice, path.stem)
    yield from unless(np.array_equal(grid.mask, grid.spot >= 0), path, "a mask that is not where spots are", "one mask")
    if not grid.n_merged:
        back = grid.spot.ravel()[grid.cell]
        yield from unless(np.array_equal(back, range(grid.n_spots)), path, "spots that lost their cell", "the inverse")
    curated = results / "slices" / f"{path.stem}.h5ad"
    if curated.is_file() and not findings(partial(check_slice, curated)):
        remade = make_grid(anndata.read_h5ad(curated), grid.layout, grid.pitch_um)
        other = [name for name in ARRAYS if not np.array_equal(getattr(grid, name), getattr(remade, name))]
        yield from unless(not other, curated, f"other {', '.join(other)} than in {path}", "equal ones", curated)
        facts = [(about.layout, about.n_spots, about.n_merged, repr(about.lattice)) for about in (grid, remade)]
        yield from same(path, "facts", *facts)


def check_genes(path: Path, results: Path) -> Findings:
    """The vocabulary: its form, and the training shards' copy of it."""
    read_vocabulary(path)
    yield from same_as_copy(path, results, "genes")


def check_components(path: Path, results: Path) -> Findings:
    tensors, facts = read_safetensors(path)
    yield from same(path, "format_version", facts["format_version"], str(VERSION))
    yield from same(path, "genes_sha256", facts["genes_sha256"], sha256_of(results / "stats/genes.tsv"))
    yield from unless(all(np.isfinite(a).all() for a in tensors.values()), path, "values not finite", "finite ones")
    yield from same_as_copy(path, results, "components")


def check_index(path: Path) -> Findings:
    """A split's index: its own form, the files beside it, the order of its samples, and what its samples say themselves."""
    text = path.read_text()
    index, folder = json.loads(text), path.parent
    yield from unless(
        text == json.dumps(index, indent=1) + "\n", path, "other spacing or digits", "JSON as it was written"
    )
    yield from same(path, "format_version and split", (index["format_version"], index["split"]), (VERSION, folder.name))
    for part in ("genes", "samples", "components", "means"):
        if part in index:
            file = folder / index[part]["file"]
            yield from same(file, "sha256", sha256_of(file), index[part]["sha256"], path)
    n_genes = len(read_vocabulary(folder / "genes.tsv").gene_id)
    yield from same(path, "number of genes", index["genes"]["n"], n_genes)
    simulated = any(row["source"] == "simulated" for row in index["slices"])
    yield from same(path, "simulated", index["simulated"], simulated)
    for key in ("config_sha256", "catalogue_sha256"):
        yield from unless(len(index[key]) == len(canonical_sha256(0)), path, f"{key} {index[key]}", "64 hex digits")

    samples = np.load(folder / "samples.npy", allow_pickle=False)
    yield from same(folder / "samples.npy", "columns", samples.dtype, SAMPLE_DTYPE, path)
    in_tars, n_windows = [row["samples"] for row in index["shards"]], [row["n_windows"] for row in index["slices"]]
    numbers = {len(samples), index["n_samples"], sum(in_tars), sum(n_windows)}
    yield from unless(len(numbers) == 1, path, f"{sorted(numbers)} samples by four counts", "one number")
    order = permutation(sum(n_windows), index["seed"], index["split"])
    of_slice = np.repeat(np.arange(len(n_windows)), n_windows)[order]
    of_window = np.concatenate([np.arange(n) for n in n_windows] or [np.zeros(0, int)])[order]
    ordered = np.array_equal(samples["slice"], of_slice) and np.array_equal(samples["window"], of_window)
    yield from unless(ordered, path, "samples in another order", "the order of the seed")
    yield from unless(
        np.array_equal(samples["shard"], np.repeat(np.arange(len(in_tars)), in_tars)),
        path,
        "tars out of order",
        "order",
    )
    tars = sorted(file.name for file in folder.glob("*.tar"))
    yield from same(path, "tars", tars, [row["name"] for row in index["shards"]])
    for number, row in enumerate(index["slices"]):
        sample = samples[np.flatnonzero(samples["slice"] == number)[0]]
        about = first_facts(folder / index["shards"][sample["shard"]]["name"], sample)
        keys, of_slice = ("m", "h", "w"), ("slice", "layout", "pitch_um")
        found = [index[key] for key in keys] + [row[key] for key in of_slice]
        yield from same(path, "facts", found, [about[key] for key in keys + of_slice])


def first_facts(file: Path, sample: np.void) -> dict:
    """The JSON of one sample, decoded with its arrays."""
    parts = []
    with open(file, "rb") as opened:
        for part in ("counts", "sites", "json"):
            opened.seek(int(sample[f"{part}_offset"]))
            parts.append(opened.read(int(sample[f"{part}_nbytes"])))
    return decode(*parts)[3]


def check_tar(path: Path, entry: dict, index: Path) -> Findings:
    """One tar of a split against its entry in the index."""
    yield from same(path, "bytes", path.stat().st_size, entry["bytes"], index)
    yield from same(path, "sha256", sha256_of(path), entry["sha256"], index)


def check_whole(path: Path, results: Path) -> Findings:
    """A whole slice, of which no hash is recorded: the tar's own frame byte for byte, its content against the grid."""
    with tarfile.open(path, "r:") as file:
        members = [(member.name, file.extractfile(member).read()) for member in file]
    framed = tar.sample(members)[0] + tar.END
    yield from unless(path.read_bytes() == framed, path, "other headers or padding", "those that its members give")
    counts, sites, facts, cell = (data for _, data in members)
    *arrays, about = decode(counts, sites, facts)
    arrays.append(np.frombuffer(blosc.decompress(cell), "<i4"))
    yield from same(path, "format_version and slice", (about["format_version"], about["slice"]), (VERSION, path.stem))
    genes, grid = results / "stats/genes.tsv", grid_at(results / "grids" / f"{path.stem}.zarr")
    yield from same(path, "genes_sha256", about["genes_sha256"], sha256_of(genes))
    if index := trained_on(results):
        both = path, results / TRAIN
        yield from same(path, "target_sum", about["target_sum"], index["target_sum"], *both)
    if grid is None:
        return
    given = {key: about[key] for key in ("genes_sha256", "target_sum", "simulated")}
    content = whole_slice(grid, read_vocabulary(genes).gene_id, codec_name="lz4", **given)
    remade = [content[at : at + size] for at, size in spans(content)]
    *others, about_grid = decode(*remade[:3])
    others.append(np.frombuffer(blosc.decompress(remade[3]), "<i4"))
    yield from same(path, "facts", about, about_grid)
    for name, mine, grids in zip(("counts", "genes", "totals", "cell"), arrays, others, strict=True):
        yield from unless(np.array_equal(mine, grids), path, f"{name} other than the grid's", f"{name} of the grid")


def spans(content: bytes) -> list[tuple[int, int]]:
    """(offset, size) of the data of each member of a tar in memory."""
    found, at = [], 0
    while len(content) - at > len(tar.END):
        size = int(content[at + 124 : at + 135], 8)
        found.append((at + tar.BLOCK, size))
        at += tar.BLOCK + size + -size % tar.BLOCK
    return found


def check_regions(path: Path, results: Path) -> Findings:
    """Hidden regions: their seal, the vocabulary whose rows they name, and the grid whose cells."""
    _, facts = read_safetensors(path)
    yield from same(path, "genes_sha256", facts["genes_sha256"], sha256_of(results / "stats/genes.tsv"))
    if grid := grid_at(results / "grids" / f"{path.stem}.zarr"):
        read_regions(path, grid)


def check_embedding(path: Path, results: Path) -> Findings:
    tensors, facts = read_safetensors(path)
    X, spot = tensors["X"], tensors["spot"]
    yield from same(
        path, "format_version and slice", (facts["format_version"], facts["slice"]), (str(VERSION), path.stem)
    )
    yield from same(path, "types of X and spot", (str(X.dtype), str(spot.dtype)), ("float32", "int32"))
    yield from unless(np.isfinite(X).all(), path, "values that are not finite", "finite ones")
    if "skipped" in facts:  # a foreign method that could not run here
        yield from same(path, "shapes of a skipped method", (X.shape, spot.shape), ((0, 0), (0,)))
        return
    n_spots = read_curated(results / "slices" / f"{path.stem}.h5ad").n_spots
    right = len(X) == n_spots and np.array_equal(spot, range(n_spots))
    yield from unless(right, path, f"{len(X)} rows of spots", f"one of each of the {n_spots} spots, in order")
    annotated = results / "annotated" / path.with_suffix(".h5ad").name
    if path.parent.name == "stpatch" and annotated.is_file():
        theirs = anndata.read_h5ad(annotated)
        right = np.array_equal(theirs.obsm[Keys.EMBEDDING], X)
        yield from unless(right, path, f"other values than in {annotated}", "equal ones", path, annotated)


def check_annotated(path: Path, results: Path) -> Findings:
    yield from sealed(path)
    curated = results / "slices" / path.name
    mine, theirs = (anndata.read_h5ad(file) for file in (path, curated))
    equal = mine.obs.equals(theirs.obs) and mine.var.equals(theirs.var) and repr(mine.uns) == repr(theirs.uns)
    equal &= np.array_equal(mine.obsm[Keys.SPATIAL], theirs.obsm[Keys.SPATIAL])
    yield from unless(equal, path, f"other obs, var, uns or positions than in {curated}", "equal ones", path, curated)
    X = [(part.data, part.indices, part.indptr) for part in (mine.X, theirs.X)]
    right = all(np.array_equal(*pair) for pair in zip(*X, strict=True))
    yield from unless(right, path, "other counts", "those of the slice")
    yield from unless(np.isfinite(mine.obsm[Keys.EMBEDDING]).all(), path, "an embedding not finite", "a finite one")


def check_model(path: Path, results: Path) -> Findings:
    """A finished model folder: that weights, settings, vocabulary and metrics belong together, and to the shards."""
    folder = path.parent
    config = json.loads((folder / "config.json").read_text())
    yield from same(folder / "config.json", "format_version", config["format_version"], VERSION, path)
    data, genes = config["data"], folder / "genes.tsv"
    yield from same(genes, "sha256", sha256_of(genes), data["genes"]["sha256"], path)
    for name in ("model", "best", "components"):
        if (file := folder / f"{name}.safetensors").is_file():
            tensors, _ = read_safetensors(file)
            finite = all(np.isfinite(tensor).all() for tensor in tensors.values())
            yield from unless(finite, file, "weights that are not finite", "finite ones", path)
            if name != "components":
                known = next(tensors[name] for name in ("gene_loading", "gene_embedding.weight") if name in tensors)
                yield from same(file, "genes with an embedding", len(known), data["genes"]["n"], path)
    if (file := folder / "components.safetensors").is_file():
        yield from same_as_copy(file, results, "components", path)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    right = steps == sorted(steps) and steps[-1:] == [config["train"]["steps"]]
    yield from unless(right, folder / "metrics.jsonl", f"steps up to {steps[-1:]}", f"{config['train']['steps']}", path)
    for name in ("README.md", "curve.svg"):
        yield from unless((folder / name).is_file(), folder / name, "no file", "one", path)
    if index := trained_on(results):
        facts = [key for key in data if key in index and key not in ("genes", "slices")]
        found, expected = ({key: part[key] for key in facts} for part in (data, index))
        # shards made again are trained on again, so that this mends either
        yield from same(folder / "config.json", f"beside {results / TRAIN},", found, expected, results / TRAIN)


def check_table(path: Path, results: Path) -> Findings:
    """A table of admission; and that every slice admitted is there as it was when it was admitted."""
    header, names, *rows = path.read_text(encoding="utf-8").splitlines()
    yield from same(path, "first line", header, f"# stpatch {path.stem} {VERSION}")
    expected = TABLES[path.stem] or (*columns(), "n_spots", "n_genes")
    yield from same(path, "columns", names.split("\t"), list(expected))
    rows = [dict(zip(expected, row.split("\t"), strict=True)) for row in rows]
    for row in rows if path.stem == "admitted" else []:
        slice_ = results / "slices" / f"{row['slice']}.h5ad"
        if slice_.is_file():
            about = read_curated(slice_)
            found, expected = (row["n_spots"], row["n_genes"]), (str(about.n_spots), str(about.n_genes))
            yield from same(path, f"spots and genes of {row['slice']}", found, expected)


# ---- all of them


def checks(results: Path) -> dict[Path, Check]:
    """The check of every file and folder of a results folder that has one."""
    found: dict[Path, Check] = {}
    kinds = {
        "slices/*.h5ad": check_slice,
        "sketches/*.npz": check_sketch,
        "stats/moments/*.npz": check_archive,
        "shards/*/index.json": check_index,
        "grids/*.zarr": partial(check_grid, results=results),
        "stats/genes.tsv": partial(check_genes, results=results),
        "stats/components.safetensors": partial(check_components, results=results),
        "shards/slices/*.tar": partial(check_whole, results=results),
        "regions/*.safetensors": partial(check_regions, results=results),
        "embeddings/*/*.safetensors": partial(check_embedding, results=results),
        "annotated/*.h5ad": partial(check_annotated, results=results),
        "pretrain/*/model.safetensors": partial(check_model, results=results),
        **{f"curate/{name}.tsv": partial(check_table, results=results) for name in TABLES},
    }
    for pattern, check in kinds.items():
        found |= {path: partial(check, path) for path in sorted(results.glob(pattern))}
    for split in SPLITS:
        index = results / "shards" / split / "index.json"
        try:
            entries = json.loads(index.read_text())["shards"]
            found |= {(file := index.parent / row["name"]): partial(check_tar, file, row, index) for row in entries}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not built, or damaged, which its own check tells
    return found


def findings(check: Check) -> list[Problem]:
    """All problems of one check; what it raises means that the file can't be read as what it should be."""
    path = check.args[0]
    remove = check.args[2] if check.func is check_tar else path
    problems = []
    try:
        problems.extend(check())
    except Exception as error:  # noqa: BLE001 whatever a reader stumbles over is said of the file, and the others go on
        # the file that isn't there may be another one than the file checked
        at = Path(error.filename) if isinstance(error, FileNotFoundError) and error.filename else path
        found = error.found if isinstance(error, SliceError) else f"{type(error).__name__}: {error}"
        problems.append(Problem(at, found, "a whole file of its kind", (remove,)))
    return problems


def verify(results: Path, jobs: int, progress: Callable[[int, int], None] = lambda done, all: None) -> list[Problem]:
    """All problems of a results folder, sorted by file.

    Parameters
    ----------
    results
        The folder.
    jobs
        Processes; a check that takes its process down is a finding too.
    progress
        Told the number of files checked, and of all.
    """
    to_do, problems, n = checks(results), [], 0
    batches = [to_do]
    while batches:
        some = batches.pop()
        with ProcessPoolExecutor(min(jobs, len(some)), mp_context=get_context("forkserver")) as pool:
            running = {pool.submit(findings, check): path for path, check in some.items()}
            broken = []
            for future in as_completed(running):
                try:
                    problems += future.result()
                    n += 1
                except BrokenProcessPool:
                    broken.append(running[future])
                progress(n, len(to_do))
        if len(some) > 1:  # one of the broken took down the others: it is found by halves
            halves = (broken[: len(broken) // 2], broken[len(broken) // 2 :])
            batches += [{path: some[path] for path in half} for half in halves if half]
        else:
            problems += [Problem(path, "a file that takes its reader down", "a whole one", (path,)) for path in broken]
            n += len(broken)
    return sorted(set(problems), key=str)


def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m workflow.verify", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("results", type=Path, help="folder that `results` names in the config")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default 1)")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1 or not checks(arguments.results):
        parser.error(f"{arguments.results}: nothing to check there, or --jobs is not at least 1")

    def show(done: int, all_: int) -> None:
        if sys.stderr.isatty() or done == all_:
            print(f"\r{done} of {all_} checked", end="" if done < all_ else "\n", file=sys.stderr, flush=True)

    problems = verify(arguments.results, arguments.jobs, show)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()

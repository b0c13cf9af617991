"""What a large corpus costs: the plan of a thousand slices timed, some of them built, and the shipped catalogue reckoned from these.

    python benchmarks/scale.py [--plan 1000 10000] [--build 50] [--cores 2] [--keep DIR] [--catalogue catalogue/visium_human.tsv]
    python benchmarks/scale.py --plan 0 --build 1000 --tiny

All slices are simulated (docs/simulator.md), as large as real ones: four kinds in turn, as four sources deposit them, with as
many genes as a probe set or a whole transcriptome has, and as deep as cortex or lymph node. They run through the repository's
own rules, with 512 windows of 512 genes. Seconds are those of Snakemake's `benchmark:` files; these sample the memory twice a second
and miss a short peak, so each job also notes its peak and its CPU seconds itself when it ends (Linux). A build that was stopped
goes on in the folder that --keep names. With --tiny the slices have 64 spots and 60 genes, files of their own: what is left of a
job's time is what it costs to have a job at all.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from workflow.catalogue import columns, load_catalogue  # noqa: E402
from workflow.simulate import choose_genes, tiny_slice  # noqa: E402

# format, layout and settings of a simulated slice (workflow/simulate.py); the last one is as deep as a lymph node
KINDS = (
    ("spaceranger", "spaceranger-2?n_genes=18085&median_depth=4000&spread=1.3"),
    ("spaceranger", "spaceranger-1?n_genes=36601&median_depth=4000&spread=1.3"),
    ("cellxgene", "cellxgene?n_genes=36601&median_depth=8000&spread=1.3"),
    ("geo", "geo?n_genes=18085&median_depth=16000&spread=1.5"),
)
TINY = {  # config of the tiny ones, over the default
    "window": [6, 6],
    "genes": 24,
    "windows_per_slice": 16,
    "max_coverage": 0,
    "min_genes": 0,
    "components": 8,
    "component_spots": 500,
    "shard_mb": 4,
}
WINDOWS = {"genes": 512, "windows_per_slice": 512, "max_coverage": 0, "components": 128}  # likewise of the others
HEADER = (
    "slice",
    "dataset",
    "split",
    "source",
    "accession",
    "url",
    "format",
    "organism",
    "technology",
    "donor",
    "evidence",
)
STAGES = (
    *("simulate", "curate", "sketch", "admit", "grid", "moments", "stats", "components", "windows", "shards"),
    *("dataset_card", "whole"),
)  # in running order
FOLDERS = {  # what a stage leaves on the disk, below results/
    "curate": "slices/*.h5ad",
    "sketch": "sketches/*.npz",
    "grid": "grids/*.zarr",
    "moments": "stats/moments/*.npz",
    "shards": "shards/[tv]*/*.tar",
    "whole": "shards/slices/*.tar",
}
BY_SPOT = (
    "curate",
    "sketch",
    "grid",
    "moments",
    "whole",
)  # whose work grows with the spots, the others' with the slices
NOTE = """
import atexit, os, sys

def note():
    stage = os.path.basename(sys.argv[0]).split(".")[-2:-1] if sys.argv[0].endswith(".py") else []
    if not stage or "/.snakemake/scripts/" not in sys.argv[0]:
        return
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    times = os.times()
    cpu = times.user + times.system + times.children_user + times.children_system
    with open(os.environ["SCALE_NOTES"], "a") as notes:
        notes.write(f"{stage[0]}\\t{peak / 1024:.1f}\\t{cpu:.3f}\\n")

atexit.register(note)
"""


def write_corpus(folder: Path, n: int, tiny: bool = False) -> list[str]:
    """Write catalogue and config of ``n`` simulated slices into ``folder``, and where they are tiny their files; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"simulated{i:0{max(4, len(str(n - 1)))}d}" for i in range(n)]
    with open(folder / "slices.tsv", "w") as table:
        table.write("\t".join(HEADER) + "\n")
        for i, name in enumerate(names):
            format_, accession = KINDS[i % len(KINDS)]
            source, url = "simulated", f"resources/simulated/{name}"
            if tiny:
                source, format_, accession, url = "file", "h5ad", "", f"tiny/{name}.h5ad"
            split = "val" if i % 20 == 19 else "train"
            row = (name, "Simulated", split, source, accession, url, format_, "human",
                   "simulated Visium", f"simulated_donor{i}", "simulated by workflow/simulate.py; no patient")  # fmt: skip
            table.write("\t".join(row) + "\n")
    (folder / "evaluated.tsv").write_text("\t".join(HEADER) + "\n")
    config = {"catalogue": "slices.tsv", "downstream": "evaluated.tsv"}
    (folder / "scale.yaml").write_text(yaml.safe_dump(config | (TINY if tiny else WINDOWS)))
    if tiny:
        write_tiny(folder / "tiny", names)
    return names


def write_tiny(folder: Path, names: Iterable[str]) -> None:
    """One h5ad of 64 spots and 60 genes a name; those that are there already stay."""
    folder.mkdir(exist_ok=True)
    genes, _ = choose_genes(ROOT / "catalogue/aux/genes_human.tsv", 60)
    for seed, name in enumerate(names):
        if not (folder / f"{name}.h5ad").is_file():
            made = tiny_slice(seed=seed, shape=(8, 16), holes=False, name=name)
            made.var_names = genes
            del made.uns["stpatch"]
            made.write_h5ad(folder / f"{name}.h5ad")


def snakemake(folder: Path, *arguments: str, notes: Path | None = None) -> tuple[float, float, float, str]:
    """Run the repository's Snakefile in ``folder``: wall and CPU seconds, peak MB (of all jobs too), and what it printed.

    Raises
    ------
    SystemExit
        It failed; its last lines are shown.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if notes:
        hook = folder / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(NOTE)
        env |= {"PYTHONPATH": str(hook), "SCALE_NOTES": str(notes)}
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    start = time.monotonic()
    with subprocess.Popen(
        [*command, "--configfile", "scale.yaml", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=folder,
    ) as started:  # fmt: skip
        printed = started.stdout.read()
        _, status, used = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise SystemExit(f"snakemake {' '.join(arguments)[:200]} failed in {folder}:\n{printed[-4000:]}")
    return time.monotonic() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, printed


def children_cpu() -> float:
    """CPU seconds of all processes that this one started and waited for, theirs included."""
    times = os.times()
    return times.children_user + times.children_system


def planned_jobs(printed: str) -> dict[str, int]:
    """Jobs of each rule, and their ``total``, from the table that a dry run prints."""
    table = printed[printed.index("Job stats:") :].split("\n\n")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+)\s+(\d+)\s*$", table, re.M)}


def pretend_admitted(folder: Path, names: Iterable[str]) -> None:
    """Empty files in place of curated slices, all admitted, so that a dry run plans what comes after admission."""
    stamp = time.time()  # of all: none is newer than another

    def touch(path: str) -> None:
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        os.utime(place, (stamp, stamp))

    rows = {row["slice"]: row for row in load_catalogue(folder / "slices.tsv")}
    for name in names:
        touch(f"resources/simulated/{name}/deposit.json")
        touch(f"results/slices/{name}.h5ad")
        touch(f"results/sketches/{name}.npz")
    lines = ["# stpatch admitted 1", "\t".join([*columns(), "n_spots", "n_genes"])]
    lines += ["\t".join([*rows[name].values(), "3600", "18085"]) for name in names]
    (folder / "results/curate").mkdir(parents=True)
    (folder / "results/curate/admitted.tsv").write_text("\n".join(lines) + "\n")
    for name in ("admitted", "quarantine", "duplicates", "notes"):
        touch(f"results/curate/{name}.tsv")


def time_plans(folder: Path, n: int) -> list[tuple[str, int, float, float, float]]:
    """(what, jobs, wall seconds, CPU seconds, peak MB) of the dry runs of ``n`` slices: nothing done yet; admitted, shards to come; and the whole job."""
    names = write_corpus(folder, n)
    found = [("`data`, nothing done yet", *dry_run(folder, "data"))]
    pretend_admitted(folder, names)
    found.append(("`data`, all curated and admitted", *dry_run(folder, "data")))
    found.append(("`all`, all curated and admitted", *dry_run(folder, "all")))
    return found


def dry_run(folder: Path, target: str) -> tuple[int, float, float, float]:
    """Jobs planned, wall and CPU seconds, peak MB."""
    # nothing was run here, so there is no record of code and params to compare with: times of files decide
    *took, printed = snakemake(folder, "--dry-run", "--rerun-triggers", "mtime", "--", target)
    return planned_jobs(printed)["total"], *took


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def build(folder: Path, n: int, cores: int, tiny: bool = False) -> dict:
    """Build ``n`` slices up to shards, and of large ones the whole slices too; add up what each stage took and left.

    Returns
    -------
    dict
        ``slices``, ``admitted``, ``spots`` (of each admitted slice); of this run, which may have resumed another: ``wall_s``,
        ``jobs``, ``between_s`` (CPU seconds of Snakemake itself and of shells); ``records``, the files in which Snakemake keeps
        what it ran; ``stages``: name -> ``jobs``, ``s``, ``cpu_s``
        (both of all jobs together), ``peak_mb`` (the highest), ``bytes`` (of all slices).
    """
    names = write_corpus(folder, n, tiny)
    notes = folder / "notes.tsv"
    notes.touch()
    earlier = len(notes.read_text().splitlines())
    wholes = [] if tiny else [f"results/shards/slices/{name}.tar" for name in names]
    wall, cpu, _, _ = snakemake(folder, "--cores", str(cores), "--", "data", *wholes, notes=notes)
    lines = [(stage, float(peak), float(used)) for stage, peak, used in map(str.split, notes.read_text().splitlines())]
    stages = {}
    for stage in sorted({stage for stage, _, _ in lines}, key=STAGES.index):
        seen = [(peak, used) for name, peak, used in lines if name == stage]
        tables = sorted((folder / "results/benchmarks" / stage).glob("**/*.tsv"))
        stages[stage] = {
            "jobs": len(seen),
            "s": sum(float(next(csv.DictReader(path.open(), delimiter="\t"))["s"]) for path in tables)
            if tables
            else None,
            "cpu_s": sum(used for _, used in seen),
            "peak_mb": max(peak for peak, _ in seen),
            "bytes": sum(map(size_of, (folder / "results").glob(FOLDERS[stage]))) if stage in FOLDERS else 0,
        }
    with open(folder / "results/curate/admitted.tsv") as table:
        next(table)
        spots = [int(row["n_spots"]) for row in csv.DictReader(table, delimiter="\t")]
    ran = lines[earlier:]
    return {
        "slices": n, "admitted": len(spots), "spots": spots, "stages": stages,
        "wall_s": wall, "jobs": len(ran), "between_s": cpu - sum(used for _, _, used in ran),
        "records": sum(1 for path in (folder / ".snakemake/metadata").rglob("*") if path.is_file()),
    }  # fmt: skip


def start_up(stage: str) -> float:
    """CPU seconds that Python and a stage's imports take before its first line of work: the least of three."""
    taken = []
    for _ in range(3):
        before = children_cpu()
        subprocess.run([sys.executable, "-c", f"import workflow.logs, workflow.{stage}"], check=True, cwd=ROOT)
        taken.append(children_cpu() - before)
    return min(taken)


def print_plans(n: int, plans: list[tuple[str, int, float, float, float]]) -> None:
    print(
        f"## Dry runs of {n:,} simulated slices\n\n| target | jobs | s | CPU s | peak MB |\n|---|---:|---:|---:|---:|"
    )
    for what, jobs, seconds, cpu, peak_mb in plans:
        print(f"| {what} | {jobs:,} | {seconds:.1f} | {cpu:.1f} | {peak_mb:,.0f} |", flush=True)


def print_build(built: dict, cores: int) -> None:
    stages, spots = built["stages"], built["spots"]
    started = {stage: start_up(stage) for stage in stages}
    print(
        f"\n## {built['slices']} simulated slices built\n\n{built['admitted']} admitted, {sum(spots)} spots "
        f"({min(spots)} to {max(spots)} a slice).\n\n"
        "| rule | jobs | s a job | CPU s a job | of these start-up | peak memory of a job, MB | bytes a slice | bytes a spot |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for stage, facts in stages.items():
        jobs, size = facts["jobs"], facts["bytes"]
        seconds = "" if facts["s"] is None else f"{facts['s'] / jobs:.2f}"
        left = f"{size / len(spots):,.0f} | {size / sum(spots):,.0f}" if size else "|"
        print(
            f"| {stage} | {jobs} | {seconds} | {facts['cpu_s'] / jobs:.2f} | {started[stage]:.2f} | "
            f"{facts['peak_mb']:,.0f} | {left} |"
        )
    used = sum(facts["cpu_s"] for facts in stages.values())
    imports = sum(started[stage] * facts["jobs"] for stage, facts in stages.items())
    print(
        f"\nThe last run took {built['wall_s']:.0f} s for {built['jobs']} jobs on {cores} core(s). Of the CPU seconds of all jobs "
        f"({used:,.0f}) {imports / used:.0%} went into starting Python and importing; Snakemake's own took "
        f"{built['between_s'] / max(built['jobs'], 1):.2f} a job besides. Wall seconds a job: "
        f"{built['wall_s'] / max(built['jobs'], 1):.2f}; records of Snakemake's: {built['records']:,}."
    )


def print_estimate(built: dict, catalogue: Path, cores: int) -> None:
    """What the corpus of a catalogue will take: in proportion to spots, or to slices where each slice gives as many windows."""
    rows = [row for row in load_catalogue(catalogue) if row["split"] in ("train", "val")]
    known = [int(row["spots"]) for row in rows if row["spots"]]
    spots = sum(known) + (len(rows) - len(known)) * statistics.median(known)
    by_slice, by_spot = len(rows) / built["admitted"], spots / sum(built["spots"])
    unknown = (
        f" ({len(rows) - len(known)} slices of unknown size taken as the median)" if len(known) < len(rows) else ""
    )
    print(
        f"\n## Reckoned for {catalogue.name}\n\n{len(rows)} slices, {spots:,.0f} spots{unknown}.\n\n"
        "| rule | grows with | GB | CPU hours |\n|---|---|---:|---:|"
    )
    disk = hours = jobs = 0.0
    for stage, facts in built["stages"].items():
        if stage != "simulate":
            what, factor = ("spots", by_spot) if stage in BY_SPOT else ("slices", by_slice)
            size, cpu = facts["bytes"] * factor / 1e9, facts["cpu_s"] * factor / 3600
            disk, hours, jobs = disk + size, hours + cpu, jobs + facts["jobs"] * by_slice
            print(f"| {stage} | {what} | {size:.1f} | {cpu:.2f} |")
    between = built["between_s"] / max(built["jobs"], 1) * jobs / 3600
    windows = built["stages"]["shards"]["bytes"] * by_slice / 1e9
    print(
        f"| Snakemake | jobs | | {between:.2f} |\n| all | | {disk:.1f} | {hours + between:.2f} |\n\n"
        f"{(hours + between) / cores:.1f} hours on {cores} core(s), {hours / 8 + between:.1f} on 8. The packs of windows lie beside the "
        f"shards until these are written: {windows:.1f} GB more for that while."
    )


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=int, nargs="+", default=[1000], help="slices of the dry runs; 0: none")
    parser.add_argument("--build", type=int, default=50, help="slices to build; 0: none")
    parser.add_argument("--tiny", action="store_true", help="build slices that take no time, to see what a job costs")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="build in this folder and leave it; default: a temporary one")
    parser.add_argument(
        "--catalogue", type=Path, default=ROOT / "catalogue/visium_human.tsv", help="table to reckon for"
    )
    args = parser.parse_args()
    for n in filter(None, args.plan):
        with tempfile.TemporaryDirectory() as folder:
            print_plans(n, time_plans(Path(folder), n))
    if args.build:
        with tempfile.TemporaryDirectory() as folder:
            built = build((args.keep or Path(folder)).resolve(), args.build, args.cores, args.tiny)
        print_build(built, args.cores)
        if not args.tiny:
            print_estimate(built, args.catalogue, args.cores)


if __name__ == "__main__":
    main()

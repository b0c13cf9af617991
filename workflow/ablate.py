"""Ablations: one table of the paper, each variant built, pretrained and scored in a folder of its own, by one command.

    python -m workflow.ablate ablations/window.yaml --configfile base.yaml --cores 2 --seeds 0 1

A variant is the base config with a few keys changed. Its folder `<results>/ablations/{table}/{variant}/seed{k}` is a working
directory of Snakemake. It begins as a clone of the finished run whose config is nearest (first: of what lies in `<results>`),
made of hard links, with Snakemake's own records of what was made from what: so it is Snakemake that finds what the variant changes, and
makes that anew. Snakemake and the stages replace files and never write into one, so nothing that is shared changes; logs, benchmarks and
snapshots, which grow in place, are not shared. The same command goes on where it was stopped.
"""

import argparse
import copy
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from workflow import ablation_table
from workflow.catalogue import check_config, columns, load_catalogue, resolve
from workflow.errors import CatalogueError
from workflow.estimate import TYPICAL_SPOTS, windows_of

ROOT = Path(__file__).parent.parent
# By name: what grows in place, and what no variant makes anew, so that it would be of another.
NOT_SHARED = ("ablations", "logs", "benchmarks", "snapshots", "*.part", "*.part.json", "*.lock")
NOT_SHARED += ("annotated", "report", "report.html")
TARGETS = ("data", "evaluate")
RECORDS = ("metadata", "incomplete")  # Snakemake's: what was made from what, and what was left half made
CONFIG, REDUCED = "ablation.yaml", "ablation.catalogue.tsv"  # in the folder of a run
SCORES = "metrics/scores.tsv"
# Rules that any variant may have to run again, beside windows and pretrain.
AGAIN = ("shards", "embed", "score", "probe_inputs", "probe", "mlp", "cluster", "regions", "inpaint", "reconstruct")
TABLE_KEYS, VARIANT_KEYS = {"title", "mirrors", "axis", "variants"}, {"config", "share", "x", "paper"}


@dataclass(frozen=True)
class Variant:
    """One row of a table: `overlay` is laid over the base config, `share` of the training slices are kept, `x` is its place on
    the table's axis, `paper` its name in the paper's tables ("" where it has none)."""

    name: str
    overlay: dict
    share: float = 1.0
    x: float | None = None
    paper: str = ""


@dataclass(frozen=True)
class Table:
    """A file of `ablations/`; `mirrors` is the number of the paper's table, None where it has no such table."""

    name: str
    title: str
    mirrors: int | None
    axis: str
    variants: list[Variant]


@dataclass(frozen=True)
class Run:
    """One variant with one seed: its folder and its whole config."""

    variant: Variant
    seed: int
    folder: Path
    config: dict

    @property
    def scores(self) -> Path:
        return self.folder / self.config["results"] / SCORES

    @property
    def finished(self) -> bool:
        """Whether it was scored, with this very config."""
        return self.scores.exists() and _read_yaml(self.folder / CONFIG) == self.config


def read_table(path: str | Path) -> Table:
    """Read a file of `ablations/`; CatalogueError names a key that is unknown or lacking."""
    content = _read_yaml(path)
    keys = set(content) if isinstance(content, dict) else set()
    if keys - TABLE_KEYS or not {"title", "variants"} <= keys:
        raise _error(path, f"the keys {sorted(keys)}", "title and variants, and if wanted mirrors and axis")
    variants = []
    for name, given in content["variants"].items():
        if set(given) - VARIANT_KEYS or not str(name).replace("_", "a").isalnum():
            raise _error(
                path, f"variant {name!r} with {sorted(given)}", f"a plain name with {', '.join(sorted(VARIANT_KEYS))}"
            )
        given = {**given, "overlay": given.get("config", {})}
        given.pop("config", None)
        variants.append(Variant(str(name), **given))
    return Table(Path(path).stem, content["title"], content.get("mirrors"), content.get("axis", ""), variants)


def merged(base: dict, over: dict) -> dict:
    """`base` with `over` laid on it as Snakemake lays --configfile: dicts key by key, all else replaced."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def plan(table: Table, base: dict, seeds: list[int]) -> list[Run]:
    """Every variant with every seed (of sampling, splits and pretraining alike), checked against the config's schema.

    Raises
    ------
    CatalogueError
        A config that breaks the schema, or a path that a run in a folder of its own could not follow.
    """
    for key, path in {
        "results": base["results"], "catalogue": base["catalogue"], "downstream": base["downstream"],
        "pretrain.config": base["pretrain"]["config"],
    }.items():  # fmt: skip
        if ".." in Path(path).parts or key == "results" and Path(path).is_absolute():
            raise CatalogueError(
                f"config: '{key}': found {path}; expected a path below the working directory, as each variant has one of its own. "
                "Next step: run in a folder above it."
            )
    runs = []
    for seed in seeds:
        for variant in table.variants:
            config = merged(merged(base, variant.overlay), {"seed": seed, "pretrain": {"seed": seed}})
            if variant.share < 1:
                config["catalogue"] = REDUCED
            check_config(config)
            folder = Path(base["results"]) / "ablations" / table.name / variant.name / f"seed{seed}"
            runs.append(Run(variant, seed, folder, config))
    return runs


def draw_slices(rows: list[dict[str, str]], share: float, seed: int) -> list[dict[str, str]]:
    """The catalogue with at least `share` of its training slices, in whole donors, drawn by (seed, donor) alone.

    What a smaller share of the same seed holds, a larger one holds too. A slice of an unknown donor counts as a donor of its
    own. Slices of other splits stay.
    """

    def donor(row: dict[str, str]) -> str:
        return f"{row['dataset']}/{row['donor']}" if row["donor"] else f"slice {row['slice']}"

    def key(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/share/{name}".encode()).digest()

    train = [donor(row) for row in rows if row["split"] == "train"]
    kept: set[str] = set()
    for name in sorted(set(train), key=key):
        if sum(name in kept for name in train) >= share * len(train):
            break
        kept.add(name)
    return [row for row in rows if row["split"] != "train" or donor(row) in kept]


def differing(one: dict, other: dict) -> int:
    """Number of settings in which two configs differ."""
    flat, others = dict(_flat(one)), dict(_flat(other))
    return sum(flat.get(key) != others.get(key) for key in flat.keys() | others.keys())


def _flat(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(run: Run, base: dict) -> Path | None:
    """The working directory to clone: the user's own, or the scored run of any ablation, whichever config differs least from this
    one's (of equals a scored one); None where nothing was built yet."""
    results = Path(base["results"])
    found = (
        [(differing(run.config, base), not (results / SCORES).exists(), Path())]
        if (results / "slices").is_dir()
        else []
    )
    for path in sorted((results / "ablations").glob(f"*/*/seed*/{CONFIG}")):
        config = _read_yaml(path)
        if (path.parent / config["results"] / SCORES).exists():
            found.append((differing(run.config, config), False, path.parent))
    return min(found)[2] if found else None


def prepare(run: Run, base: dict) -> None:
    """Make the run's folder, or bring its config up to date if it is there."""
    if run.folder.exists():
        _write_settings(run, run.folder, base)
        return
    origin, part = nearest(run, base), run.folder.with_name(f"{run.folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write_settings(run, part, base)
    _show_own_files(part, hidden={Path(base["results"]).parts[0], "resources"})
    if origin is not None:
        clone(origin, part, base["results"])
    part.rename(run.folder)  # whole now


def clone(origin: Path, folder: Path, results: str) -> None:
    """What was built in one working directory, in another: files as hard links, Snakemake's records as copies.

    Raises
    ------
    CatalogueError
        If Snakemake is at work in `origin`.
    """
    if any((origin / ".snakemake/locks").glob("*")):
        raise CatalogueError(
            f"{origin.resolve()}: locked by a run of Snakemake, so that files may be half made. Next step: let it end; if none "
            "runs, `snakemake --unlock` there."
        )
    for name in ("resources", results):
        if (origin / name).is_dir():
            shutil.copytree(
                origin / name, folder / name, copy_function=os.link, ignore=shutil.ignore_patterns(*NOT_SHARED)
            )
    for name in RECORDS:
        if (origin / ".snakemake" / name).is_dir():
            shutil.copytree(origin / ".snakemake" / name, folder / ".snakemake" / name)


def _show_own_files(folder: Path, hidden: set[str]) -> None:
    """Links to what else lies in the user's working directory, so that relative paths of configs and tables lead there."""
    for entry in sorted(Path().iterdir()):
        if not entry.name.startswith(".") and entry.name not in hidden and entry.exists():
            link, times = folder / entry.name, entry.stat()
            link.symlink_to(entry.resolve(), target_is_directory=entry.is_dir())
            # of a link's time and its target's Snakemake takes the later
            os.utime(link, ns=(times.st_atime_ns, times.st_mtime_ns), follow_symlinks=False)


def _write_settings(run: Run, folder: Path, base: dict) -> None:
    (folder / CONFIG).write_text(yaml.safe_dump(run.config))
    if run.variant.share < 1:
        rows = draw_slices(load_catalogue(resolve(base["catalogue"], ROOT)), run.variant.share, run.seed)
        with open(folder / REDUCED, "w", newline="") as file:
            table = csv.DictWriter(
                file, columns(), delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None
            )
            table.writeheader()
            table.writerows(rows)


def build(run: Run, cores: int, more: list[str]) -> bool:
    """Let Snakemake bring the run's scores up to date, its output on the terminal; False if it failed."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", str(cores)]
    command += ["--directory", str(run.folder.resolve()), *more]
    command += ["--configfile", str((run.folder / CONFIG).resolve()), "--", *TARGETS]
    return subprocess.run(command, check=False).returncode == 0


def seconds_by_rule(folder: Path, results: str) -> dict[str, float]:
    """Seconds that the jobs of each rule took in a working directory, by its benchmark files."""
    found: dict[str, float] = {}
    top = folder / results / "benchmarks"
    for path in sorted(top.rglob("*.tsv")):
        with open(path, newline="") as file:
            rule = path.relative_to(top).parts[0]
            found[rule] = found.get(rule, 0.0) + sum(float(row["s"]) for row in csv.DictReader(file, delimiter="\t"))
    return found


def estimate(runs: list[Run], base: dict, cores: int) -> str:
    """A line on the time that the unfinished runs take: at most what a like run took from the windows on, for windows of their
    size; where none was timed yet, what there is to do."""
    todo = [run for run in runs if not run.finished]
    timed = [(Path(), base)] + [
        (path.parent, _read_yaml(path))
        for path in sorted((Path(base["results"]) / "ablations").glob(f"*/*/seed*/{CONFIG}"))
    ]
    for folder, config in reversed(timed):
        took = seconds_by_rule(folder, base["results"])
        if "pretrain" in took and "score" in took:
            own = _values(config)
            rest = sum(took.get(rule, 0.0) for rule in AGAIN)
            seconds = sum(
                (took["pretrain"] + took.get("windows", 0.0) / cores) * _values(run.config) / own + rest / cores
                for run in todo
            )
            about = (
                f"at most about {round(seconds / 60 + 0.5)} min on {cores} cores, by the times of {folder.resolve()}"
            )
            return f"{len(todo)} of {len(runs)} runs to do: {about}"
    windows = sum(_windows(run.config) for run in todo)
    told = f"{windows:,} windows of a training slice in all; nothing was timed yet, the first run will tell"
    return f"{len(todo)} of {len(runs)} runs to do: {told}"


def _windows(config: dict) -> int:
    """Windows of a slice as large as most are."""
    return windows_of(config["windows_per_slice"], config["max_coverage"], TYPICAL_SPOTS, config["window"])


def _values(config: dict) -> int:
    """Numbers in these windows."""
    return _windows(config) * config["genes"] * config["window"][0] * config["window"][1]


def _read_yaml(path: str | Path):
    try:
        return yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise _error(path, " ".join(str(error).split()), "a YAML file") from error


def _error(path: str | Path, found: str, expected: str) -> CatalogueError:
    return CatalogueError(f"{path}: found {found}; expected {expected}. Next step: correct it.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.ablate",
        description=__doc__.partition("\n")[0],
        epilog="What stands behind -- goes to Snakemake, such as -- --profile my-slurm",
    )
    parser.add_argument("table", help="a file of ablations/")
    parser.add_argument(
        "--configfile", nargs="+", default=[], help="laid over the repository's config.yaml in this order"
    )
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", help="these alone")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)
    args, more = parser.parse_args(given[:end]), given[end + 1 :]
    try:
        table = read_table(args.table)
        base = _read_yaml(ROOT / "config.yaml")
        for path in args.configfile:
            base = merged(base, _read_yaml(path))
        if unknown := set(args.variants or []) - {variant.name for variant in table.variants}:
            raise _error("--variants", ", ".join(sorted(unknown)), ", ".join(v.name for v in table.variants))
        whole = plan(table, base, args.seeds)
        runs = [run for run in whole if not args.variants or run.variant.name in args.variants]
        print(f"{table.title}: {estimate(runs, base, args.cores)}", flush=True)
        if args.dry_run:
            for run in runs:
                changed = {**run.variant.overlay, **({"share": run.variant.share} if run.variant.share < 1 else {})}
                print(f"{'done ' if run.finished else 'to do'} {run.folder}  {json.dumps(changed)}")
            return 0
        failed = []
        for number, run in enumerate(runs, 1):
            print(f"[{number}/{len(runs)}] {run.folder}", flush=True)
            prepare(run, base)
            if not build(run, args.cores, more):
                failed.append(run)
            if number < len(runs):
                print(estimate(runs, base, args.cores), flush=True)
        scored = [run for run in whole if run.finished and run not in failed]
        made = ablation_table.write(table, scored, Path(base["results"]) / "ablations")
    except CatalogueError as error:
        sys.exit(f"error: {error}")
    print(*(f"wrote {path}" for path in made), sep="\n")
    for run in failed:
        print(
            f"failed: {run.folder}; its logs lie in {run.folder / run.config['results'] / 'logs'}; the same command goes on"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

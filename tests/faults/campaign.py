"""Break a run on purpose and see what becomes of it: ``python -m tests.faults.campaign [--kills 50] [--write docs/reliability.md]``.

A tiny simulated corpus (tests/faults/corpus.py) is built once undisturbed. Then it is killed, starved of disk, locked, made
older and newer, damaged and robbed of files; after each fault the same command is given again, and what comes out must have the
bytes of the undisturbed build, or the run must stop with a message that names the file and the remedy. Only processes that the
campaign has started are killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT
from tests.faults.corpus import ROWS, TARGETS, final_files, manifest, write_corpus

SLICES = [row["slice"] for row in ROWS]
TRAIN = [row["slice"] for row in ROWS if row["split"] == "train"]
SAME, STOPPED, TOLD = "same bytes", "named and remedied", "went on, verify tells"
READ_ONLY = ["simulate", "curate", "shards", "pretrain"]  # stages that meet an output that can't be written
# Files of each stage, in running order, and how many pages of 4,096 bytes are left free when its disk is full.
STAGES = {
    "simulate": (["resources/simulated/sim_c/deposit.json"], 2),
    "curate": ([f"results/slices/{name}.h5ad" for name in SLICES], 2),
    "sketch": ([f"results/sketches/{name}.npz" for name in SLICES], 0),
    "admit": (["results/curate/admitted.tsv"], 0),
    "grid": ([f"results/grids/{name}.zarr" for name in SLICES], 2),
    "moments": ([f"results/stats/moments/{name}.npz" for name in TRAIN], 0),
    "stats": (["results/stats/genes.tsv"], 0),
    "components": (["results/stats/components.safetensors"], 0),
    "windows": ([f"results/windows/{name}.bin" for name in SLICES], 2),
    "shards": (["results/shards/train/index.json", "results/shards/val/index.json"], 2),
    "dataset_card": (["results/shards/README.md"], 0),
    "whole": (["results/shards/slices/tiny_a.tar"], 2),
    "pretrain": (["results/pretrain/model/model.safetensors"], 4),
    "embed": (["results/embeddings/stpatch/tiny_a.safetensors"], 0),
    "annotate": (["results/annotated/tiny_a.h5ad"], 2),
}
# A file of each kind in which a byte is flipped, and the output of a stage that reads it.
DAMAGED = {
    "curated slice": ("results/slices/tiny_a.h5ad", "results/sketches/tiny_a.npz"),
    "sketch": ("results/sketches/tiny_a.npz", "results/curate/admitted.tsv"),
    "chunk of a grid": ("results/grids/tiny_a.zarr/counts/c/0/0/0", "results/shards/slices/tiny_a.tar"),
    "moments": ("results/stats/moments/tiny_a.npz", "results/stats/genes.tsv"),
    "shard": ("results/shards/train/train-000000.tar", "results/pretrain/model/model.safetensors"),
    "samples.npy": ("results/shards/train/samples.npy", "results/pretrain/model/model.safetensors"),
    "index.json": ("results/shards/train/index.json", "results/pretrain/model/model.safetensors"),
    "shards' genes.tsv": ("results/shards/train/genes.tsv", "results/pretrain/model/model.safetensors"),
    "whole slice": ("results/shards/slices/tiny_a.tar", "results/embeddings/stpatch/tiny_a.safetensors"),
    "model": ("results/pretrain/model/model.safetensors", "results/embeddings/stpatch/tiny_a.safetensors"),
    "embedding": ("results/embeddings/stpatch/tiny_a.safetensors", "results/annotated/tiny_a.h5ad"),
}
REMEDY = re.compile(r"Next step: ")
JOB = re.compile(r"\.snakemake/scripts/|-m trainer\.")


@dataclass
class Tally:
    """What became of the faults: kind -> outcome -> how often; and what to look at."""

    counts: dict[str, Counter] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, kind: str, outcome: str, remark: str = "", times: int = 1) -> None:
        self.counts.setdefault(kind, Counter())[outcome] += times
        if remark:
            self.remarks.append(f"{kind}: {remark}")
        print(f"{time.strftime('%H:%M:%S')} {kind}: {outcome} {remark}", flush=True)

    def bad(self) -> dict[str, Counter]:
        return {kind: found for kind, found in self.counts.items() if set(found) - {SAME, STOPPED, TOLD}}

    def table(self) -> str:
        titles = ("fault", "injected", "a rerun gave the same bytes", "stopped, naming file and remedy")
        rows = [(*titles, "went on, but verify names it", "none of these"), ("---",) * 6]
        for kind, found in self.counts.items():
            known = [found[outcome] for outcome in (SAME, STOPPED, TOLD)]
            rows.append((kind, found.total(), *known, found.total() - sum(known)))
        lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
        return "\n".join(lines)


class Build:
    """A folder in which the tiny corpus is built, by real runs of Snakemake."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, folder / "results"
        self.sessions: list[int] = []  # of all runs that were started
        write_corpus(folder)

    def start(self, *targets: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
        """Snakemake in a session of its own; its output goes to ``out.txt``."""
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
        command += [*options, "--configfile", "tiny.yaml", "--", *(targets or TARGETS)]
        with open(self.folder / "out.txt", "w") as out:
            started = subprocess.Popen(
                command, cwd=self.folder, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        self.sessions.append(started.pid)
        return started

    def run(self, *targets: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        """Exit code and output; a lock that a killed run left is taken away first, as its message says."""
        code = self.start(*targets, options=options).wait(timeout=600)
        said = (self.folder / "out.txt").read_text()
        if code and "Directory cannot be locked" in said:
            self.start(options=("--unlock",)).wait(timeout=120)
            code = self.start(*targets, options=options).wait(timeout=600)
            said = (self.folder / "out.txt").read_text()
        return code, said

    def must(self, *targets: str, options: tuple[str, ...] = ()) -> None:
        """Run; a failure ends the campaign."""
        code, said = self.run(*targets, options=options)
        if code:
            raise RuntimeError(f"the undisturbed run in {self.folder} failed:\n{said[-4000:]}")

    def processes(self) -> dict[int, str]:
        """Command lines of the living processes that this build's runs have started, by process id."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if session in self.sessions and command:  # the dead have none
                    found[int(entry.name)] = command
        return found

    def orphans_ended(self) -> None:
        while self.processes():
            time.sleep(0.2)

    def same(self, reference: dict[str, str], *deleted: str) -> str:
        """After a fault: give the command again, and compare. What was deleted is asked for by name: Snakemake doesn't make
        again what nothing needs any more."""
        self.orphans_ended()
        code, said = self.run(*TARGETS, *deleted)
        if code:
            return f"the rerun failed: {last_words(said)}"
        found = final_files(self.results)
        other = sorted(name for name in {**reference, **found} if reference.get(name) != found.get(name))
        return f"other bytes in {len(other)} files: {', '.join(other[:4])}" if other else SAME

    def clear(self) -> None:
        for name in ("results", "resources", ".snakemake"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def copy_of(self, other: Build) -> Build:
        """Make this folder an exact copy of another, times included."""
        self.clear()
        for name in ("results", "resources", ".snakemake"):
            shutil.copytree(other.folder / name, self.folder / name, symlinks=True)
        for path in self.folder.iterdir():  # the inputs, too
            if path.is_file() and (there := other.folder / path.name).is_file():
                shutil.copy2(there, path)
        return self

    def verified(self) -> tuple[int, list[str]]:
        """Exit code and lines of ``python -m workflow.verify``."""
        done = subprocess.run(
            [sys.executable, "-m", "workflow.verify", "results", "--jobs", "2"],
            cwd=self.folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines()

    def follow(self, lines: list[str]) -> list[str]:
        """Delete what the lines of verify say; returns what that was."""
        deleted: list[str] = []
        for line in lines:
            command = line.rpartition("Next step: ")[2].partition("; then run again")[0]
            if command.startswith("rm -r "):
                deleted += shlex.split(command)[2:]
                for name in shlex.split(command)[2:]:
                    path = self.folder / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return sorted(set(deleted))


def last_words(said: str) -> str:
    """The line of an output in which a job said why it ended."""
    lines = [
        line.strip() for line in said.splitlines() if re.match(r"\s*(error: |[\w.]*(Error|Damaged\w*|Changed)\b)", line)
    ]
    return (lines or said.strip().splitlines() or [""])[0][:300]


# ---- faults


def kills(build: Build, reference: dict[str, str], n: int, rng: random.Random, tally: Tally) -> None:
    """Kill jobs, Snakemake, or both at random moments, several times a build; a build counts for all that it went through."""
    survived: Counter = Counter()

    def settle() -> None:
        outcome = build.same(reference)
        for kind, times in survived.items():
            tally.add(kind, outcome, times=times)
        survived.clear()
        build.clear()

    while n:
        started = build.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(timeout=rng.uniform(1, 9))
        said = (build.folder / "out.txt").read_text()
        if started.poll() is not None and "Directory cannot be locked" in said:
            build.start(options=("--unlock",)).wait(timeout=120)
            continue
        if started.poll() == 0:
            settle()
            continue
        jobs = [
            pid for pid, command in build.processes().items() if JOB.search(command) and "snakemake --" not in command
        ]
        signal_ = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        whose = rng.choice(["a job", "snakemake", "snakemake and all its jobs"])
        with contextlib.suppress(ProcessLookupError):
            if whose == "a job":
                if not jobs:
                    whose = "snakemake"
                    os.kill(started.pid, signal_)
                else:
                    os.kill(rng.choice(jobs), signal_)
            elif whose == "snakemake":
                os.kill(started.pid, signal_)
            else:
                os.killpg(started.pid, signal_)
        survived[f"{signal_.name} of {whose}"] += 1
        n -= 1
        # Of a killed Snakemake the jobs may live on: the next run begins beside them, as an impatient user's would.
        started.wait(timeout=600)
    if survived:
        settle()


@contextlib.contextmanager
def small_disks(folder: Path) -> Iterator[Callable[..., None]]:
    """Results and resources on file systems in memory of their own; yields what fills, empties, locks and opens them."""
    places = [folder / "results", folder / "resources"]
    with contextlib.ExitStack() as stack:
        for place in places:
            place.mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", place], check=True)

        def set_(*, pages: int | None = None, readonly: bool = False) -> None:
            for place in places:
                subprocess.run(["mount", "-o", f"remount,{'ro' if readonly else 'rw'}", place], check=True)
                if readonly:
                    continue
                ballast = place / ".ballast"
                ballast.unlink(missing_ok=True)
                if pages is not None:
                    free = os.statvfs(place)
                    ballast.write_bytes(bytes((free.f_bavail - pages) * free.f_frsize))

        yield set_


def may_mount() -> bool:
    """Whether a file system may be mounted here."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
        return not done.returncode and not subprocess.run(["umount", folder]).returncode


def disks(build: Build, reference: dict[str, str], tally: Tally) -> None:
    """At each stage a disk that is full, or that can't be written."""
    build.clear()
    with small_disks(build.folder) as disk:
        failed: Counter = Counter()
        for stage, (targets, pages) in STAGES.items():
            options = ("--notemp",) if stage in ("windows", "shards") else ()
            for kind, chosen, state in (
                ("disk full", STAGES, {"pages": pages}),
                ("read-only output", READ_ONLY, {"readonly": True}),
            ):
                if stage not in chosen:
                    continue
                disk(**state)
                code, said = build.run(*targets, options=options)
                disk()
                # a folder that Snakemake itself can't write to it names without a remedy
                plain = "Read-only file system: '" if "readonly" in state else "No space left on device"
                if not code:
                    tally.add(kind, "not noticed", stage)
                elif plain not in said or not ("readonly" in state or REMEDY.search(said)):
                    tally.add(kind, "no plain message", f"{stage}: {last_words(said)}")
                else:
                    failed[kind] += 1
            build.must(*targets, options=options)
        shutil.rmtree(build.results / "windows")
        outcome = build.same(reference)
        for kind, times in failed.items():
            tally.add(kind, outcome, times=times)
        shutil.rmtree(build.folder / ".snakemake")


def two_at_once(build: Build, finished: Build, reference: dict[str, str], tally: Tally) -> None:
    """A second run in a folder where one is going on."""
    build.copy_of(finished)
    shutil.rmtree(build.results / "shards/train")
    first = build.start()
    while not list((build.folder / ".snakemake/locks").glob("*")):
        time.sleep(0.1)
    first.send_signal(signal.SIGSTOP)  # what is left to do takes less time than a second run may need to start
    second = subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1"]
        + ["--configfile", "tiny.yaml", "--", *TARGETS],
        cwd=build.folder, capture_output=True, text=True,
    )  # fmt: skip
    said = second.stdout + second.stderr
    told = second.returncode and "cannot be locked" in said and "--unlock" in said
    tally.add("a second run in the folder", STOPPED if told else "not refused")
    first.send_signal(signal.SIGCONT)
    first.wait(timeout=600)
    tally.add("a first run beside a second", build.same(reference))


def clocks(build: Build, finished: Build, reference: dict[str, str], rng: random.Random, tally: Tally) -> None:
    """Times of files as a clock leaves them that was set back, was far behind, or jumped about."""
    for kind, shift in {
        "clock set back by a day": lambda: 86400.0,
        "clock behind by ten years": lambda: -10 * 365 * 86400.0,
        "clock that jumps": lambda: rng.uniform(-86400, 86400),
    }.items():
        build.copy_of(finished)
        for folder in ("results", "resources"):
            for path in sorted((build.folder / folder).rglob("*")):
                when = path.stat().st_mtime + shift()
                os.utime(path, (when, when))
        shutil.rmtree(build.results / "shards/train")  # so that there is something to do
        code, said = build.run()
        if not code or "clock skew problem" not in said:
            tally.add(kind, build.same(reference))
            continue
        # Snakemake names both files and leaves the remedy to docs/reliability.md
        for path in build.folder.rglob("*"):
            if path.stat().st_mtime > time.time():
                os.utime(path)
        outcome = build.same(reference)
        tally.add(kind, STOPPED if outcome == SAME else outcome)


def flip(path: Path, rng: random.Random) -> None:
    """Turn one bit of a file over, as a disk does: its times stay."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flips_met(build: Build, finished: Build, kinds: list[str], rng: random.Random, tally: Tally) -> None:
    """A flipped bit that the next stage meets: it stops and names the file, or what it makes is none the worse."""
    for kind in kinds:
        build.copy_of(finished)
        name, target = DAMAGED[kind]
        flip(build.folder / name, rng)
        subprocess.run(["rm", "-r", target], cwd=build.folder, check=True)
        code, said = build.run(target)
        if not code:
            reference, mine = final_files(finished.results), final_files(build.results)
            inside = target.removeprefix("results/")
            same = all(mine.get(name) == reference[name] for name in reference if name.startswith(inside))
            told = any(Path(name).name in line or ".zarr" in line for line in build.verified()[1])
            outcome = SAME if same else TOLD if told else "went on, nothing tells"
            tally.add(f"bit flipped, met by a run: {kind}", outcome, "" if same or told else name)
        else:
            shown = [part for part in (name, *map(str, Path(name).parents)) if part.count("/") >= 2]
            named = any(part in said for part in shown) and REMEDY.search(said)
            outcome = STOPPED if named else "no plain message"
            tally.add(f"bit flipped, met by a run: {kind}", outcome, "" if named else last_words(said))


def flips_verified(
    build: Build, finished: Build, reference: dict[str, str], kinds: list[str], rng: random.Random, tally: Tally
) -> None:
    """A flipped bit in a file of each kind: verify names it, and what it says to delete is all that it takes."""
    build.copy_of(finished)
    seen = []
    for kind in kinds:  # alone, since one damage may hide another
        path = build.folder / DAMAGED[kind][0]
        kept, times = path.read_bytes(), path.stat()
        flip(path, rng)
        blamed = DAMAGED[kind][0].partition("/counts/")[0]
        if any(blamed in line for line in build.verified()[1]):
            seen.append((kind, path.read_bytes()))
        else:
            tally.add(f"bit flipped, verified: {kind}", "not seen")
        path.write_bytes(kept)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for kind, damaged in seen:
        path = build.folder / DAMAGED[kind][0]
        times = path.stat()
        path.write_bytes(damaged)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    deleted = []
    while lines := build.verified()[1][:-1]:  # some show only once others are gone
        deleted += build.follow(lines)
    outcome = build.same(reference, *deleted)
    for kind, _ in seen:
        tally.add(f"bit flipped, verified: {kind}", outcome)


def vanished(
    build: Build, finished: Build, reference: dict[str, str], n: int, rng: random.Random, tally: Tally
) -> None:
    """Files that are gone: Snakemake makes again what it knows, verify names the others."""
    names = list(final_files(finished.results))
    for _ in range(n):
        name = rng.choice(names)
        build.copy_of(finished)
        (build.results / name).unlink()
        deleted = build.follow(build.verified()[1]) or [f"results/{name}"]
        tally.add("a file vanished", build.same(reference, *deleted), name)


def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3, help="of flipped bits; four times as many files vanish")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="page that holds the table, between its marks")
    arguments = parser.parse_args(argv)
    rng, tally, begin = random.Random(arguments.seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        finished, build = Build(Path(folder) / "finished"), Build(Path(folder) / "broken")
        finished.must()
        reference = final_files(finished.results)
        print(f"undisturbed: {manifest(finished.results)} in {time.monotonic() - begin:.0f} s", flush=True)
        two_at_once(build, finished, reference, tally)
        if may_mount():
            disks(build, reference, tally)
        else:
            tally.remarks.append("disk full, read-only output: left out, since this user may mount no file system")
        clocks(build, finished, reference, rng, tally)
        for _ in range(arguments.rounds):
            flips_met(build, finished, list(DAMAGED), rng, tally)
            flips_verified(build, finished, reference, list(DAMAGED), rng, tally)
        vanished(build, finished, reference, 4 * arguments.rounds, rng, tally)
        build.clear()
        kills(build, reference, arguments.kills, rng, tally)
    minutes = (time.monotonic() - begin) / 60
    table = (
        f"Seed {arguments.seed}, {minutes:.0f} minutes on {os.cpu_count()} cores; simulated slices.\n\n{tally.table()}"
    )
    print(table, *tally.remarks, sep="\n")
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        head, rest = page.split("<!-- faults -->\n", 1)
        tail = rest.split("<!-- /faults -->", 1)[1]
        arguments.write.write_text(f"{head}<!-- faults -->\n{table}\n<!-- /faults -->{tail}", encoding="utf-8")
    sys.exit(bool(tally.bad()))


if __name__ == "__main__":
    main()

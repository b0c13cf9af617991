"""What a run announces before it starts."""

from __future__ import annotations

import pytest

from workflow.estimate import CONNECTION, CURATED, GRID, PACKED_WINDOW, cores_of, deposited_bytes, estimate


def row(name: str, **columns: str) -> dict[str, str]:
    return {
        "slice": name,
        "source": "geo",
        "url": "https://h/x/",
        "bytes": "",
        "format": "geo",
        "spots": "1000",
    } | columns


def of(rows, root, **changes):
    options = {"results": "results", "windowed": {"a"}, "windows_per_slice": 10, "max_coverage": 0}
    options |= {"window": (10, 10), "genes": 10}
    return estimate(rows, **options | changes, root=root)


def make(root, *places: str) -> None:
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text("")


def test_bytes_that_the_catalogue_states_are_summed_and_others_are_guessed_and_counted(tmp_path):
    rows = [row("a", bytes="300000000"), row("b")]
    found = of(rows, tmp_path)
    guess, known = deposited_bytes(rows[1], 1000)
    assert not known
    assert (found.slices, found.downloads, found.guessed) == (2, 2, 1)
    assert found.download_bytes == 3e8 + guess
    windows = 2 * PACKED_WINDOW * 10 * 1000
    assert found.disk_bytes == pytest.approx(found.download_bytes + 2 * 1000 * (CURATED + GRID) + windows)


def test_sizes_of_some_of_the_urls_are_a_lower_bound():
    guess, known = deposited_bytes(row("a", url="https://h/1 https://h/2"), 1000)
    assert deposited_bytes(row("a", url="https://h/1 https://h/2", bytes="5"), 1000) == (guess, known)
    assert deposited_bytes(row("a", url="https://h/1 https://h/2", bytes="9000000000"), 1000) == (9e9, False)


def test_an_archive_that_several_slices_take_members_from_is_fetched_once(tmp_path):
    rows = [row(name, url=f"https://h/x.zip#member={name}.h5ad", bytes="500000000") for name in "ab"]
    found = of(rows, tmp_path)
    assert (found.downloads, found.guessed, found.download_bytes) == (2, 0, 5e8)


def test_what_lies_there_is_not_counted_again(tmp_path):
    make(tmp_path, "resources/download/a/files.json")
    fetched = of([row("a")], tmp_path)
    assert (fetched.downloads, fetched.download_bytes) == (0, 0)
    assert fetched.disk_bytes > 1000 * (CURATED + GRID)
    make(tmp_path, "results/slices/a.h5ad", "results/grids/a.zarr/zarr.json")
    windows = of([row("a")], tmp_path)
    assert windows.disk_bytes == pytest.approx(2 * PACKED_WINDOW * 10 * 1000)
    assert windows.core_seconds < fetched.core_seconds
    make(tmp_path, "results/shards/train/index.json", "results/shards/val/index.json")
    nothing = of([row("a")], tmp_path)
    assert (nothing.slices, nothing.disk_bytes, nothing.core_seconds) == (0, 0, 0)


def test_only_slices_that_windows_are_drawn_from_cost_windows(tmp_path):
    assert of([row("a")], tmp_path).disk_bytes > of([row("evaluated")], tmp_path).disk_bytes


def test_simulated_slices_are_named_as_such_and_fetch_nothing(tmp_path):
    found = of([row("a", source="simulated", spots="")], tmp_path)
    assert found.downloads == 0
    assert "1 slices, 1 of them simulated; 0 to download, 0.0 GB;" in found.line(2, 10**9)


def test_hours_shrink_with_cores_and_grow_with_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    found = of([row("a", bytes=str(int(CONNECTION * 36000)))], tmp_path)
    assert found.hours(1) == pytest.approx(10, rel=0.02)
    assert found.hours(5) == pytest.approx(found.hours(1) / 5)
    assert "about 10 h on 1 core (about 5 h on the 2 of this machine), at 5 MB/s" in found.line(1, 10**12)
    assert "about 1 min on 2 cores, at" in of([row("a")], tmp_path).line(2, 10**12)


def test_a_disk_is_too_small_from_the_first_byte_that_is_lacking(tmp_path):
    found = of([row("a", bytes="3000000000")], tmp_path)
    enough = int(found.disk_bytes + 2e9)
    assert found.refusal(enough, 2) == ""
    assert "found 5.0 GB free" in found.refusal(enough - 10**6, 2)
    assert "3.0 GB are downloads, and 2 GB to spare" in found.refusal(0, 2)
    assert found.refusal(0, -10) == ""
    assert of([], tmp_path).refusal(0, 5) == ""


def test_cores_are_those_told_as_far_as_the_machine_has_them(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert [cores_of(*told) for told in ((2, None), (64, None), (None, None), (None, 50))] == [2, 4, 4, 50]


def test_windows_that_coverage_leaves_out_need_no_disk(tmp_path):
    at_most, covered = of([row("a")], tmp_path), of([row("a")], tmp_path, max_coverage=0.5)
    assert at_most.disk_bytes - covered.disk_bytes == pytest.approx(2 * PACKED_WINDOW * (10 - 5) * 1000)

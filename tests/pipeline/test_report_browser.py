"""The report in a real browser: every figure loads, and nothing is asked of the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import finished
from tests.conftest import ROOT
from workflow.report import command

pytestmark = [pytest.mark.pipeline, pytest.mark.browser]

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
LOCAL = ("file:", "data:", "blob:")
CONTAMINATED = "The scores of stpatch are not those of unseen tissue"
CATEGORIES = ["1 Slices", "2 Windows", "3 Pretraining", "4 Scores", "5 Maps"]


@pytest.fixture(scope="session")
def built_tiny(tmp_path_factory) -> Path:
    """Working directory in which rules score to report ran on tiny simulated slices."""
    directory = tmp_path_factory.mktemp("tiny")
    finished.make(directory / "results")
    (directory / "made").mkdir()
    (directory / "results/curate/admitted.tsv").rename(directory / "made/admitted.tsv")
    (directory / "Snakefile").write_text(finished.SNAKEFILE.format(root=str(ROOT), source="simulated"))
    # A config that only the command line knows must reach the nested call.
    protocols = "[random20, leave_section, blocks, clustering, reconstruction]"
    (directory / "over.yaml").write_text(f"evaluate: {{splits: 2, protocols: {protocols}}}\n")
    (directory / "more.yaml").write_text("allow_contamination: true\n")
    call = [sys.executable, "-m", "snakemake", "--cores", "2", "--directory", str(directory)]
    call += ["--snakefile", str(directory / "Snakefile"), "--configfile", "over.yaml", "more.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return directory


@pytest.fixture(scope="session", params=["built_tiny", "built_demo"])
def report(request) -> Path:
    return request.getfixturevalue(request.param) / "results/report.html"


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, report):
    """The report's page; `page.asked` collects what it asks for, `page.failed` what goes wrong in it."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    page.asked, page.failed = [], []

    def judge(route):
        page.asked.append(route.request.url)
        route.continue_() if route.request.url.startswith(LOCAL) else route.abort()

    context.route("**/*", judge)
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.failed.append(str(error)))
    page.goto(report.as_uri())
    page.wait_for_selector("text=Workflow")
    yield page
    context.close()


def show_all(page):
    """Click through every category and view button; yields (path of the result, its mime type) once it is shown."""
    for category in CATEGORIES:
        page.reload()
        page.click(f"text={category}")
        n_views = page.locator("a[iconname=eye]").count()
        assert n_views, f"category {category} lists no figure"
        for number in range(n_views):
            page.locator("a[iconname=eye]").nth(number).click()
            path, mime = page.evaluate("[app.state.resultPath, results[app.state.resultPath].mime_type]")
            yield path, mime


def test_every_figure_of_the_report_loads_and_no_request_leaves_the_file(opened):
    listed = opened.evaluate("Object.keys(results)")
    shown = set()
    for path, mime in show_all(opened):
        if mime == "text/html":
            frame = opened.frame_locator("iframe")
            assert frame.locator("h1").inner_text(), f"{path} shows nothing"
        else:
            opened.wait_for_function("document.querySelector('img[src^=\"data:image/png\"]')?.complete")
            width = opened.evaluate("document.querySelector('img[src^=\"data:image/png\"]').naturalWidth")
            assert width > 0, f"{path} does not load"
        shown.add(path)
    assert shown == set(listed)
    assert [url for url in opened.asked if not url.startswith(LOCAL)] == []
    assert opened.failed == []


def test_pages_of_scores_need_no_horizontal_scroll_at_1280_pixels(browser, report):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(report.as_uri())
    page.click("text=4 Scores")
    n_pages = 0
    for number in range(page.locator("a[iconname=eye]").count()):
        page.locator("a[iconname=eye]").nth(number).click()
        if page.evaluate("results[app.state.resultPath].mime_type") == "text/html":
            page.frame_locator("iframe").locator("h1").wait_for()
            (frame,) = page.main_frame.child_frames
            frame.evaluate("document.querySelectorAll('details').forEach(part => (part.open = true))")
            wide, shown = frame.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert wide <= shown < 1280
            n_pages += 1
    assert n_pages
    page.close()


def test_every_figure_has_a_caption_and_a_category(opened):
    captions = opened.evaluate("Object.values(results).map(result => result.caption)")
    assert captions
    assert all(len(caption) > 80 for caption in captions)
    assert sorted(opened.evaluate("Object.keys(categories)")) == CATEGORIES


def test_the_report_stays_small_enough_to_mail(report):
    assert report.stat().st_size < 15e6


def test_the_config_of_the_run_reaches_the_report_and_contamination_is_said_in_red(browser, built_tiny):
    page = browser.new_page()
    page.goto((built_tiny / "results/report.html").as_uri())
    danger = page.locator(".danger").first
    assert "allow_contamination is on" in danger.inner_text()
    assert danger.evaluate("element => getComputedStyle(element).backgroundColor") == "rgb(204, 51, 17)"
    assert CONTAMINATED in danger.inner_text()
    assert CONTAMINATED in (built_tiny / "results/report.html").read_text()
    page.close()


def test_the_start_page_says_in_yellow_that_slices_are_simulated(opened):
    said = opened.locator(".simulated").first
    assert "Slices of this run are simulated" in said.inner_text()
    assert said.evaluate("element => getComputedStyle(element).backgroundColor") == "rgb(255, 243, 196)"


def test_a_report_of_real_uncontaminated_slices_has_neither_box(browser, built_tiny):
    (built_tiny / "real.smk").write_text(finished.SNAKEFILE.format(root=str(ROOT), source="file"))
    figures = [str(path.relative_to(built_tiny)) for path in sorted((built_tiny / "results/report").rglob("*.*"))]
    call = command("real.smk", "over.yaml", figures, "real.html")
    done = subprocess.run(call, cwd=built_tiny, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    page = browser.new_page()
    page.goto((built_tiny / "real.html").as_uri())
    page.wait_for_selector("text=Workflow")
    assert "cut from slices on compacted grids" in page.inner_text("body")
    assert page.locator(".danger").count() == page.locator(".simulated").count() == 0
    assert CONTAMINATED not in (built_tiny / "real.html").read_text()
    page.close()


def test_a_second_run_has_nothing_to_do(built_tiny):
    call = [sys.executable, "-m", "snakemake", "--dry-run", "--directory", str(built_tiny)]
    call += ["--snakefile", str(built_tiny / "Snakefile"), "--configfile", "over.yaml", "more.yaml"]
    done = subprocess.run(call, cwd=built_tiny, capture_output=True, text=True)
    assert "Nothing to be done" in done.stdout + done.stderr

"""The pages of a report in a real browser: filters change what is shown, texts stay texts, and nothing is fetched or fails.

Needs playwright and a Chromium: Debian's package, or the one that the environment variable CHROMIUM names.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from answered_rows import add_answers
from html_pages import HOSTILE
from many_rows import make_many
from report_rows import add_ttft
from tmbench.report.html.pages import PAGES, written
from tmbench.report.report import build

pytestmark = pytest.mark.slow
NAMES = ["index", *(page.name for page in PAGES)]
SECONDS = {"dense": 1.0, "tri_mix": 0.5, "minference": 0.8}
WRONG = {"dense": 0, "tri_mix": 20, "minference": 1}
PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'tmbench[browser]'")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with driver.sync_playwright() as started:
        if program is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: install Debian's package, or name one in CHROMIUM")
        found = started.chromium.launch(executable_path=program)
        yield found
        found.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Pages of two devices, two lengths and two tasks, hostile texts among them."""
    root = tmp_path_factory.mktemp("rows")
    for length in (4096, 8192):
        for method, seconds in SECONDS.items():
            add_ttft(root, method, length, seconds * length / 4096, coverage=0.5, floor_s=0.1)
            for task in ("vt", "cwe"):
                wrong = WRONG[method] if task == "vt" else 0
                scores = [0.0] * wrong + [1.0] * (40 - wrong)
                prompts = [{"prompt": f"before {HOSTILE} {task} {n} after"} for n in range(40)]
                add_answers(root, method, task, scores, [HOSTILE + method] * 40, length=length, more=prompts)
    other = {"device": "other-gpu", "device_name": HOSTILE, "model": HOSTILE}
    add_ttft(root, "dense", 4096, 1.0, **other)
    add_ttft(root, "tri_mix", 4096, status="failed", error=HOSTILE, **other)
    directory = tmp_path_factory.mktemp("site")
    list(written(build(root), root, directory))
    return directory


@pytest.fixture
def visit(browser, site):
    """``visit(name)`` opens a page; in the end nothing must have failed, asked the network, or run out of a text."""
    contexts, problems = [], []

    def open_page(name, directory=site, **options):
        context = browser.new_context(viewport=options.pop("viewport", LAPTOP), **options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        inside = directory.as_uri() + "/"
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: problems.append(f"a script ran: {dialog.message}"))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
        page.on("request", lambda it: it.url.startswith((inside, "data:,")) or problems.append(f"asked for {it.url}"))
        page.goto(f"{inside}{name}.html")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


@pytest.mark.parametrize("name", NAMES)
def test_a_page_opens_on_any_screen_and_on_paper(visit, name):
    for viewport in (PHONE, LAPTOP):
        for scheme in ("light", "dark"):
            page = visit(name, viewport=viewport, color_scheme=scheme)
            wide, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert wide <= room, "the page itself never scrolls sideways"
    assert not page.query_selector("img")
    controls = page.locator("input, select, button")
    assert all(controls.evaluate_all("all => all.map(one => Boolean(one.labels?.length || one.ariaLabel || one.innerText))"))
    page.emulate_media(media="print")
    assert not page.is_visible("nav")
    assert page.is_visible("h1")


def test_filters_change_what_is_shown(visit):
    page = visit("times")
    assert page.inner_text("#shown") == "2 of 2 shown"
    assert page.locator(".block:visible").count() == 2
    points = page.locator(".block:visible .point").count()
    page.select_option("select[name=length]", "8192")
    assert page.inner_text("#shown") == "1 of 2 shown"
    left = page.locator(".block:visible .point")
    assert 0 < left.count() < points
    assert all("at 8K" in label for label in left.evaluate_all("marks => marks.map(mark => mark.ariaLabel)"))
    page.select_option("select[name=model]", HOSTILE)
    assert page.inner_text("#shown") == "0 of 2 shown"
    page.select_option("select[name=length]", "")
    assert page.locator(".block:visible").count() == 1
    assert page.text_content(".block:visible .device") == HOSTILE


def test_what_is_chosen_goes_along_to_other_pages(visit):
    page = visit("tasks")
    page.select_option("select[name=length]", "8192")
    page.get_by_role("link", name="Samples").click()
    page.wait_for_url("**/samples.html#*")
    assert page.input_value("select[name=length]") == "8192"
    assert page.inner_text("#shown") == "1 to 4 of 4"
    page.select_option("select[name=length]", "")
    assert "#" not in page.url
    page.reload()
    assert page.inner_text("#shown") == "1 to 8 of 8"


def test_a_line_is_switched_off_with_its_roofline(visit):
    page = visit("times")
    chart = page.locator(".chart", has_text="Seconds").last
    before = chart.locator(".point").count()
    chart.get_by_label("tri_mix", exact=True).uncheck()
    labels = chart.locator(".point").evaluate_all("marks => marks.map(mark => mark.ariaLabel)")
    assert len(labels) == before - 4
    assert not any(label.startswith("tri_mix") for label in labels)


def test_points_are_read_by_keyboard(visit):
    page = visit("times")
    page.locator(".chart", has_text="Seconds").last.locator(".point[tabindex='0']").focus()
    assert page.evaluate("document.activeElement.ariaLabel").startswith("dense at 4K: 1.00 s")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.ariaLabel").startswith("dense at 8K: 2.00 s")
    page.keyboard.press("ArrowDown")
    words = page.evaluate("document.activeElement.ariaLabel")
    assert words.startswith("tri_mix at 8K: 1.00 s")
    assert page.inner_text("#tip") == words
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")


def test_a_task_takes_the_place_of_the_average_and_the_margin_moves(visit):
    page = visit("trade-off")
    assert page.locator(".point text", has_text="8K").count() == 2
    page.select_option("select[name=length]", "4096")
    assert page.locator(".point text").count() == 0
    dot = page.locator(".point[aria-label^='minference at 4K']")
    average = dot.get_attribute("aria-label")
    assert "average of 2 tasks" in average
    assert "too few samples" in average
    page.select_option("select[name=task]", "vt")
    assert "points against dense, vt" in dot.get_attribute("aria-label")
    page.select_option("select[name=task]", "")
    line = page.locator(".margin").first.get_attribute("y1")
    page.focus("input[name=margin]")
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#chosen-margin") == "10"
    assert dot.get_attribute("aria-label").endswith("no measurable loss")
    assert page.locator(".margin").first.get_attribute("y1") != line


def test_the_heat_map_is_read_by_keyboard_at_the_chosen_margin(visit):
    page = visit("tasks")
    page.locator(".heat td[tabindex='0']").first.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    words = page.evaluate("document.activeElement.ariaLabel")
    assert words.startswith("tri_mix on cwe: score 100")
    assert "more samples a task" in words
    page.locator("input[name=margin]").evaluate(
        "e => { e.value = e.max; e.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    assert page.evaluate("document.activeElement.ariaLabel").endswith("no measurable loss")
    page.hover(".heat td[aria-label^='tri_mix on vt']")
    assert page.inner_text("#tip").endswith("loss")
    page.select_option("select[name=task]", "cwe")
    assert page.is_hidden(".heat td[aria-label^='tri_mix on vt']")
    assert page.is_visible(".heat td[aria-label^='tri_mix on cwe']")


def test_answers_are_set_side_by_side_as_texts(visit):
    page = visit("samples")
    page.select_option("select[name=length]", "4096")
    assert page.inner_text("#shown") == "1 to 4 of 4"
    page.fill("input[name=text]", "tri_mix")
    assert page.inner_text("#shown") == "1 to 2 of 2"
    page.get_by_role("button", name="20 samples of vt lost by tri_mix").click()
    page.wait_for_selector("#answers .sample")
    assert page.inner_text("#samples [role=status]").startswith("Samples 1 to 10 of 20")
    texts = (
        page.locator("#sample-3").locator("xpath=..").locator("pre").evaluate_all("all => all.map(one => one.textContent)")
    )
    assert texts[1:] == [HOSTILE + "dense", HOSTILE + "tri_mix"]
    assert "vt 3" in texts[0]
    page.click("#samples-after")
    page.wait_for_selector("#sample-19")
    assert page.is_disabled("#samples-after")


def test_a_command_is_copied(visit):
    page = visit("rows")
    page.select_option("select[name=task]", "vt")
    assert page.inner_text("#shown") == "rows 1 to 6 of 6"
    page.get_by_role("button", name="The command of").nth(1).click()
    command = page.inner_text("#command code")
    assert command.startswith("OMP_NUM_THREADS=2 tmbench ruler --method")
    page.get_by_role("button", name="Copy the command").click()
    page.wait_for_function("document.querySelector('#command [role=status]').textContent === 'Copied.'")
    assert page.evaluate("navigator.clipboard.readText()") == command


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    root, directory = tmp_path_factory.mktemp("many"), tmp_path_factory.mktemp("large")
    rows, samples = make_many(root)
    assert rows >= 10_000
    assert samples >= 50_000
    list(written(build(root), root, directory))
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_many_rows_load_in_less_than_three_seconds(browser, large, name):
    """Counted is the time in which the page's own thread computes, whatever else the machine has to do."""
    page = browser.new_page(viewport=LAPTOP)
    metrics = page.context.new_cdp_session(page)
    metrics.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(f"{large.as_uri()}/{name}.html")
    page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    seconds = {one["name"]: one["value"] for one in metrics.send("Performance.getMetrics")["metrics"]}
    page.close()
    assert 0 < seconds["ScriptDuration"] < seconds["TaskDuration"] < 3

"""The rendered book in a browser: errors, requests, width, accessibility, and explorers by mouse and by keyboard.

Needs the extra "browser" and a Chromium, Debian's or Playwright's own; is skipped where one of them is missing.
"""

import re
import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install --editable '.[browser]' brings Playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install --editable '.[browser]'")

from pages import PAGES  # noqa: E402

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
EXPLORERS = {"mnist": 1, "mvtec15": 1, "disentanglement": 1}
# The theme's own: what its scripts say on every page, and what axe finds of how it sets a bibliography.
THEME_SAYS = {
    "error: Identifier 'THEBE_JS_URL' has already been declared",
    "console: Got invalid theme mode: . Resetting to auto.",
}
THEME_HAS = {("aria-required-children", '<div role="list" class="citation-list">')}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        installed = shutil.which("chromium") or shutil.which("chromium-browser")
        try:
            chromium = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, html):
    """A function that opens a page of the book and keeps, as `wrong`, its errors and the requests that leave."""
    contexts = []

    def open_page(name, width=1280, scheme="light", script=True):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.wrong = []
        page.on("pageerror", lambda error: page.wrong.append(f"error: {error}"))
        page.on("console", lambda said: page.wrong.append(f"console: {said.text}") if said.type == "error" else None)
        page.on("request", lambda request: page.wrong.append(f"request: {request.url}") if leaves(request) else None)
        page.goto((html / f"{name}.html").as_uri(), wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()


def leaves(request) -> bool:
    return not request.url.startswith(("file:", "data:", "blob:"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_sound(opened, name, width, scheme):
    page = opened(name, width, scheme)
    page.evaluate("document.querySelectorAll('article details').forEach(one => one.open = true)")
    page.wait_for_timeout(200)  # what is unfolded is told to the scripts
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert set(page.wrong) <= THEME_SAYS
    wide, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= room
    options = {"resultTypes": ["violations"], "preload": False}
    found = axe.Axe().run(page, context="article", options=options).response["violations"]
    grave = {
        (one["id"], re.match(r"<[^>]*>", node["html"])[0])
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    }
    assert grave <= THEME_HAS


def controls(figure):
    return figure.locator("select, input[type=range]").all()


def shown(figure):
    """What an explorer says, and what it has drawn."""
    drawn = "one => [...one.querySelectorAll('.explorer-drawing:not(.explorer-scale) canvas')].map(c => c.toDataURL())"
    return figure.locator("[aria-live]").text_content(), figure.evaluate(drawn)


@pytest.mark.parametrize("name", EXPLORERS)
def test_explorers_move_by_keyboard_and_by_mouse(opened, name):
    page = opened(name)
    figures = page.locator("figure.explorer").all()
    assert len(figures) == EXPLORERS[name]
    for figure in figures:
        for control in controls(figure):
            assert page.locator(f"label[for={control.get_attribute('id')}]").text_content()
            before = shown(figure)
            control.focus()
            page.keyboard.press("End" if control.input_value() == "0" else "Home")
            page.wait_for_timeout(100)
            after = shown(figure)
            assert after[0] != before[0]
            assert after[1] != before[1]
            if control.evaluate("one => one.tagName") == "SELECT":  # its list is the system's, and on no page
                control.select_option(index=1 if control.input_value() == "0" else 0)
            else:
                box = control.bounding_box()
                control.click(position={"x": box["width"] * 0.6, "y": box["height"] / 2})
            page.wait_for_timeout(100)
            assert shown(figure)[0] != after[0]
    assert set(page.wrong) <= THEME_SAYS


@pytest.mark.parametrize("name", EXPLORERS)
def test_without_a_script_a_figure_stays(opened, name):
    page = opened(name, script=False)
    for figure in page.locator("figure.explorer").all():
        assert controls(figure) == []
        pictures = figure.locator("img").all()
        assert pictures
        assert all(picture.get_attribute("alt") and picture.bounding_box()["width"] > 200 for picture in pictures)


def test_an_explorer_says_the_greatest_value_of_the_record(opened):
    from expvae_book import runs

    page = opened("mnist")
    figure = page.locator("figure.explorer").first
    said = figure.locator("[aria-live]").text_content()
    values = [float(run.arrays["trained/conv2, liu2020_paper"][7].max()) * peak for run, peak in peaks(runs)]
    assert float(re.search(r"greatest value (\S+);", said)[1]) in [float(f"{value:.3g}") for value in values]


def peaks(runs):
    for run in runs.find("mnist"):
        if (peak := run.arrays.get("trained/conv2, liu2020_paper, peak")) is not None:
            yield run, float(peak)

"""The dashboard in a real browser: what it shows, on a phone, in the dark, by keyboard and to a screen reader."""

import os
import re
import shutil
from pathlib import Path

import pytest

from bem.serving.keys import add_key
from tests.serving.learned import learn, told_of
from tests.serving.running import add_router, client, served
from tests.serving.test_api import complete

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")  # fmt: skip
sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
PICTURES = os.environ.get("BEM_PICTURES")
"""Folder for screenshots; unset: none are taken."""
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """A server over a router, with answers behind it, that tells of a learner."""
    home = tmp_path_factory.mktemp("dashboard")
    learn(home, after=160)
    add_router(home / "routers", home / "work")
    with served(home / "routers") as server:
        for i in range(6):
            complete(client(server), prompt=f"User: {i % 2}\nAssistant:", max_tokens=40, seed=i)
        server.serving.learning = told_of(home)
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser, server, **options):
    """A page that has shown its data, and the errors that it met."""
    page = browser.new_page(**options)
    page.set_default_timeout(WAIT_MS)
    errors = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith(server.url) else errors.append(r.url))
    page.goto(f"{server.url}/dashboard")
    page.locator("#candidates tr").first.wait_for()
    page.locator("#answers tr").first.wait_for()
    return page, errors


def picture(page, name):
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{PICTURES}/{name}.png", full_page=True)


def luminance(colour):
    """Of rgb(...), as WCAG 2 defines it."""
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(page, selector):
    """Between the text of an element and the card that it stands on."""
    script = """s => { const e = document.querySelector(s);
        return [getComputedStyle(e).color, getComputedStyle(e.closest('section')).backgroundColor]; }"""
    one, other = sorted(map(luminance, page.evaluate(script, selector)))
    return (other + 0.05) / (one + 0.05)


def test_it_shows_what_was_learned_and_decided(homes, browser):
    page, errors = opened(browser, homes, viewport={"width": 1280, "height": 900})
    told = homes.serving.learning.read()
    assert page.locator("#candidates tr").count() == len(told["candidates"])
    assert page.locator("#ledger tr").count() == len(told["ledger"]) >= 2
    assert "does not run" in page.locator("#learner").inner_text()
    marks = page.locator("#marks").inner_text()
    assert re.search(r"\d+ promoted", marks)
    assert "rolled back" in marks
    assert page.locator("#versions tr").count() == 2 and page.locator("#answers tr").count() == 6
    picture(page, "wide")
    assert not errors
    page.close()


def test_a_phone_scrolls_in_one_direction_alone(homes, browser):
    page, errors = opened(browser, homes, viewport={"width": 375, "height": 740}, is_mobile=True, has_touch=True)  # fmt: skip
    picture(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not errors
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_by_day_and_by_night(homes, browser, scheme):
    page, errors = opened(browser, homes, color_scheme=scheme)
    picture(page, scheme)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(back) < 0.1) is (scheme == "dark")
    for text in (
        "#learner",
        "#learn-score",
        "#candidates td",
        "#candidates td.rolled",
        "#ledger td",
        "#from",
    ):
        assert contrast(page, text) >= 4.5, text
    assert not errors
    page.close()


def test_everything_is_reached_by_keyboard(homes, browser):
    page, _ = opened(browser, homes)
    page.keyboard.press("Tab")
    pause = page.get_by_role("button", name="Pause")
    assert pause.evaluate("e => e === document.activeElement")
    page.keyboard.press("Enter")
    assert page.get_by_role("button", name="Go on").get_attribute("aria-pressed") == "true"
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        label = page.evaluate("document.activeElement.getAttribute('aria-labelledby')")
        reached.append(label)
    assert {"learn-candidates", "learn-ledger"} <= set(
        reached
    )  # tables that are wider than the screen
    page.close()


def test_a_screen_reader_hears_what_the_pictures_show(homes, browser):
    page, _ = opened(browser, homes)
    curve = page.get_by_role(
        "img", name=re.compile(r"score from event 0 to \d+: .* promoted at event")
    )
    assert curve.count() == 1
    for drawn in page.locator("svg").all():
        assert drawn.get_attribute("aria-label")
    assert page.get_by_role("region", name="Learning").count() == 1
    table = page.get_by_role("region", name="Candidates, the newest first")
    assert table.get_by_role("columnheader", name="what became of it").count() == 1
    assert table.get_by_role("cell", name="rolled back").count() == 1
    page.close()


def test_a_key_is_asked_for_and_opens_it(browser, tmp_path):
    key = add_key(tmp_path / "keys.json", "ada")
    with served(keys=str(tmp_path / "keys.json")) as server:
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(f"{server.url}/dashboard")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Show").click()
        page.locator("#versions tr").first.wait_for()
        page.get_by_text("off: start the server with --learn").wait_for()
        page.close()

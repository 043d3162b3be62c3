"""The search page in Chromium: typing, dropping an image, the dim slider, groups, errors; two widths, two themes."""

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import drawing, encoded
from helpers.indexes import indexed
from helpers.server import serving_app

from mmrl.search.query import Searcher, search_index

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

__all__ = ["indexed"]


@contextmanager
def running(indexed: Path, api_key: str | None = None) -> Iterator[str]:
    """The URL of a running server."""
    from mmrl.search.app import create_app

    with serving_app(create_app(Searcher.open(indexed / "index"), ["127.0.0.1"], api_key=api_key)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def address(indexed: Path) -> Iterator[str]:
    with running(indexed) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The open page. A script error or a request to another host fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, wrong = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on(
        "request", lambda request: None if request.url.startswith((address, "blob:")) else wrong.append(request.url)
    )
    page.goto(address)
    page.wait_for_selector(".card")
    yield page
    context.close()
    assert not wrong


def shown(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".columns:not(.busy) .caption").all_inner_texts()]


def settled(page: Any) -> None:
    page.wait_for_load_state("networkidle")
    page.wait_for_selector(".columns:not(.busy) .card .rank:not(:empty)")


def move_slider(page: Any, position: int) -> None:
    page.locator("#dim").focus()
    page.keyboard.press("Home")
    for _ in range(position):
        page.keyboard.press("ArrowRight")
    settled(page)


def test_typing_searches_and_the_slider_changes_the_dim(page: Any, indexed: Path) -> None:
    def expected(dim: int) -> list[str]:
        hits = search_index(indexed / "index", "a red square", dim=dim, k=24, quiet=True)["results"]
        return [hit["captions"][0] for hit in hits]

    page.keyboard.type("a red square")  # the text field has the focus
    settled(page)
    assert shown(page) == expected(16)
    assert page.inner_text("#dim-shown") == "16 of 16"
    assert page.inner_text("#bytes") == "64 B"
    assert page.inner_text("#search-time").endswith(" ms")
    move_slider(page, 0)
    assert page.inner_text("#dim-shown") == "4 of 16"
    assert page.inner_text("#bytes") == "16 B"
    assert page.inner_text("#encode-time") == "0 ms"
    assert shown(page) == expected(4) != expected(16)


def test_search_by_a_dropped_image(page: Any) -> None:
    data = base64.b64encode(encoded(drawing(7)[0])).decode()
    page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const moved = new DataTransfer();
            moved.items.add(new File([bytes], "mine.png", { type: "image/png" }));
            for (const kind of ["dragenter", "drop"]) {
                const event = new DragEvent(kind, { dataTransfer: moved, bubbles: true, cancelable: true });
                document.body.dispatchEvent(event);
            }
        }""",
        data,
    )
    settled(page)
    assert shown(page)[0] == drawing(7)[1]
    assert page.inner_text(".score >> nth=0") == "1.000"
    assert page.is_visible("#query-image")
    assert not page.is_visible("#drop")
    page.click("#query-image button")
    page.wait_for_selector("#examples button")
    assert page.locator(".rank:not(:empty)").count() == 0


def test_search_by_a_chosen_file_and_by_a_result(page: Any, tmp_path: Path) -> None:
    drawing(11)[0].save(tmp_path / "mine.png")
    page.set_input_files("#file", tmp_path / "mine.png")
    settled(page)
    assert shown(page)[0] == drawing(11)[1]
    page.click(".card button >> nth=1")  # searches by the second result
    settled(page)
    assert page.inner_text(".score >> nth=0") == "1.000"


def test_compare_with_the_full_dim_and_filter_by_group(page: Any) -> None:
    page.fill("#text", "a red square")
    page.check("#compare")
    move_slider(page, 1)
    page.wait_for_selector(".two")
    heads = page.locator(".columns h2").all_inner_texts()
    assert heads[0].startswith("16 dims (full)")
    assert "64 B" in heads[0]
    assert heads[1].startswith("8 dims")
    assert "results in common" in heads[1]
    assert page.locator("section .grid").count() == 2
    page.uncheck("#compare")
    page.select_option("#group", "green square")
    page.locator(".card >> nth=2").wait_for(state="detached")
    assert page.locator(".card").count() == 2
    assert all(text.startswith("a green square") for text in shown(page))


def test_an_error_is_shown(browser: Any, address: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector(".card")
    page.set_input_files("#file", tmp_path / "text.png")
    page.wait_for_selector("#message.bad")
    assert "no picture in a known format" in page.inner_text("#message")
    page.close()


def test_the_page_asks_for_the_api_key(browser: Any, indexed: Path) -> None:
    with running(indexed, "the-key") as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("#key input:focus")
        assert "This server needs its API key" in page.inner_text("#message")
        page.fill("#key input", "another")
        page.keyboard.press("Enter")
        page.wait_for_selector("#message.bad")
        assert "does not accept this API key" in page.inner_text("#message")
        page.fill("#key input", "the-key")
        page.keyboard.press("Enter")
        page.wait_for_selector(".card")
        assert not page.is_visible("#key")
        page.fill("#text", "a red square")
        settled(page)
        assert page.wait_for_function("document.querySelector('.card img').naturalWidth > 0")
        context.close()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_layout_and_contrast(browser: Any, address: str, width: int, theme: str) -> None:
    """No horizontal scrolling, touch targets of at least 40 px, text contrast of at least 4.5."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme)
    page = context.new_page()
    for path in ("/", "/docs"):
        page.goto(address + path)
        page.wait_for_selector("article, .card")
        assert page.evaluate("document.documentElement.scrollWidth") == width
    page.goto(address)
    page.fill("#text", "a red square")
    settled(page)
    assert page.locator("#choose").bounding_box()["height"] >= 40
    for selector in (".caption", ".score", "#about", "#search-time", "#text", ".ticks"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    context.close()


# WCAG contrast of an element's text with the nearest opaque background.
CONTRAST = """(selector) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => {
        const part = (v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
    };
    let behind = document.querySelector(selector);
    const ink = rgba(getComputedStyle(behind).color);
    while (rgba(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const [a, b] = [luminance(ink), luminance(rgba(getComputedStyle(behind).backgroundColor))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
}"""


def test_a_dim_that_was_not_trained_is_marked(page: Any) -> None:
    def without_8(route: Any) -> None:
        response = route.fetch()
        route.fulfill(response=response, json={**response.json(), "nested_dims": [4, 16]})

    page.route("**/api/index", without_8)
    page.reload()
    page.wait_for_selector(".card")
    page.keyboard.type("a red square")
    shown_dims = []
    for position in range(3):
        move_slider(page, position)
        shown_dims.append(page.locator("#dim-shown").inner_text())
    assert shown_dims == ["4 of 16", "8 of 16 (not trained)", "16 of 16"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_an_encoder_with_one_tower_takes_one_kind_of_query(page: Any, tower: str) -> None:
    def of_one_tower(route: Any) -> None:
        response = route.fetch()
        route.fulfill(response=response, json={**response.json(), "queries": [tower]})

    page.route("**/api/index", of_one_tower)
    page.reload()
    page.wait_for_selector(".card")
    assert [page.is_visible(one) for one in ("#text", "#choose")] == [tower == "text", tower == "image"]
    assert ("drop your own image" in page.inner_text(".hint")) == (tower == "image")

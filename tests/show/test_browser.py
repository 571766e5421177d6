"""Both pages in a real browser: silent, asking for nothing, readable on a phone and in the dark, usable with the keyboard.

Skips where no browser is installed. To look at the pages: QLORA_LITE_SCREENSHOTS=some/folder keeps pictures of them.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_lite import show
from qlora_lite.show.page import write_page
from tests.show.browser import NAMES, Browser, Page, find_browser
from tests.show.run_files import make_plan, write_run

PATH = find_browser()
pytestmark = [
    pytest.mark.skipif(PATH is None, reason=f"no browser on this machine: none of {', '.join(NAMES)}"),
    pytest.mark.skipif(sys.platform == "win32", reason="the browser is driven over inherited pipes, which Windows has not"),
]  # fmt: skip

OPEN_ALL, CLOSE_ALL = (
    f"document.querySelectorAll('details').forEach((each) => (each.open = {is_open}))" for is_open in ("true", "false")
)
# Ratio of contrast by WCAG 2.2, of every element that holds text itself: [ratio, needed, text], only those that fall short.
LOW_CONTRAST = """
(() => {
  const channels = (colour) => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number)
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
  const isOpaque = (colour) => channels(colour)[3] !== 0
  const behind = (node) => {
    if (node.classList.contains('in')) return getComputedStyle(node.previousElementSibling).fill
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor
      if (isOpaque(colour)) return colour
    }
    return 'rgb(255, 255, 255)'
  }
  const found = []
  for (const node of document.body.querySelectorAll('*')) {
    if (![...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())) continue
    const style = getComputedStyle(node), size = parseFloat(style.fontSize)
    const ink = light(channels(node.closest('svg') ? style.fill : style.color)), paper = light(channels(behind(node)))
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)
    const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5
    if (ratio < needed) found.push([ratio, needed, node.textContent.slice(0, 40)])
  }
  return found
})()
"""
# Boxes that scroll sideways but that no key reaches.
UNREACHABLE = """
[...document.querySelectorAll('*')].filter((box) => box.scrollWidth > box.clientWidth + 1 && box.tabIndex < 0
  && ['auto', 'scroll'].includes(getComputedStyle(box).overflowX)).map((box) => box.outerHTML.slice(0, 80))
"""
# Texts of drawings that lie over one another or stick out.
BAD_TEXTS = """
[...document.querySelectorAll('svg')].flatMap((svg) => {
  const whole = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')]
  if (!whole.width) return []
  const boxes = texts.map((text) => text.getBoundingClientRect())
  return texts.filter((text, i) => boxes[i].left < whole.left - 1 || boxes[i].right > whole.right + 1
    || boxes.some((box, j) => j < i && box.left < boxes[i].right - 1 && boxes[i].left < box.right - 1
      && box.top < boxes[i].bottom - 1 && boxes[i].top < box.bottom - 1)).map((text) => text.textContent)
})
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PATH is not None
    with Browser.start(PATH, profile=tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module", params=["run", "plan"])
def page(request: pytest.FixtureRequest, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("pages")
    if request.param == "run":
        run = write_run(folder / "country-qa-1")
        path = write_page(run / "report.html", show.render_report(run))
    else:
        path = show.write_plan_page(make_plan(), folder / "plan.html")
    opened = browser.open(path.as_uri())
    opened.name, opened.url = request.param, path.as_uri()  # type: ignore[attr-defined]
    return opened


def test_the_page_says_nothing_in_the_console_and_asks_for_nothing(page: Page) -> None:
    page.evaluate(OPEN_ALL)
    urls = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
    assert urls == [page.url]  # type: ignore[attr-defined]
    assert page.events("Log.entryAdded") == []
    assert page.events("Runtime.consoleAPICalled") == []
    assert page.events("Runtime.exceptionThrown") == []


@pytest.mark.parametrize("width", [320, 400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_on_every_screen(page: Page, width: int, scheme: str) -> None:
    page.look(width=width, scheme=scheme)
    page.evaluate(OPEN_ALL)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(LOW_CONTRAST) == []
    assert page.evaluate(UNREACHABLE) == []
    assert page.evaluate(BAD_TEXTS) == []
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    page.evaluate(CLOSE_ALL)
    _keep(page, f"{width}-{scheme}.png", page.screenshot())


def test_dark_and_light_are_two_pictures(page: Page) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page.look(width=1280, scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]


def test_the_first_stop_of_the_keyboard_skips_to_the_content(page: Page) -> None:
    page.look(width=1280)
    page.press_tab()
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#content"
    box = page.evaluate("JSON.parse(JSON.stringify(document.activeElement.getBoundingClientRect()))")
    assert box["left"] >= 0 and box["top"] >= 0  # it is out of sight until then
    page.press_tab()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_screen_reader_finds_names_for_drawings_and_regions(page: Page) -> None:
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = [
        node for node in nodes if node.get("role", {}).get("value") in ("image", "img", "region", "table", "navigation")
    ]
    assert len(named) > 8
    assert [node for node in named if not node.get("name", {}).get("value")] == []


def test_what_is_closed_on_the_screen_is_printed(page: Page) -> None:
    page.evaluate(CLOSE_ALL)
    page.look(width=800, scheme="dark", media="print")
    hidden = (
        "[...document.querySelectorAll('details > :not(summary)')].filter((each) => !each.checkVisibility()).length"
    )
    assert page.evaluate(hidden) == 0
    assert (
        page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 34, 48)"
    )  # dark ink whatever the screen is
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    _keep(page, "print.pdf", pdf)


def _keep(page: Page, name: str, content: bytes) -> None:
    folder = os.environ.get("QLORA_LITE_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{page.name}-{name}").write_bytes(content)  # type: ignore[attr-defined]

"""What every page promises: it is one file, and a screen reader finds its way."""

from itertools import pairwise

import pytest

from qlora_lite import show
from qlora_lite.show.page import Html, html, table
from qlora_lite.show.plan_page import render_plan
from tests.show.parsed import Parsed
from tests.show.run_files import EVIL, make_plan, write_run


@pytest.fixture(params=["run", "plan"])
def page(request, tmp_path):
    is_run = request.param == "run"
    return Parsed(show.render_report(write_run(tmp_path / "run")) if is_run else render_plan(make_plan()))


def test_headings_go_down_one_level_at_a_time(page):
    levels = [int(tag[1]) for tag in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))


def test_every_link_leads_to_a_place_on_the_page_and_no_place_is_there_twice(page):
    places = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(places) == len(set(places))
    links = [link["href"] for link in page.all("a")]
    assert links[0] == "#content" and {link[1:] for link in links} <= set(places)


def test_every_drawing_has_words_and_every_table_a_caption_and_headings(page):
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert page.tags.count("caption") == page.tags.count("table") > 3
    assert {heading["scope"] for heading in page.all("th")} == {"row", "col"}
    assert page.tags.count("svg") <= page.tags.count("table")  # each has its numbers beside it


def test_the_page_forbids_itself_everything_but_its_own_style(page):
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert page.all("html") == [{"lang": "en"}]


def test_text_is_escaped_once_and_html_is_kept():
    assert html("a < b & c") == "a &lt; b &amp; c"
    assert html(html("a < b")) == "a &lt; b"
    assert "<script" not in table(EVIL, [EVIL], [[EVIL]])
    assert "<b>bold</b>" in table("caption", ["name"], [[Html("<b>bold</b>")]])


def test_braces_in_the_data_are_kept():
    assert "{title} {0}" in Parsed(render_plan({"model": "{title} {0}"})).words


def test_numbers_stand_to_the_right_and_words_to_the_left():
    shown = table("caption", ["name", "size", "why"], [["1", "3 MiB", "so"], ["2", "–", "3"]])
    assert [cell.get("class") for cell in Parsed(shown).all("td")] == ["number", None, "number", None]


def test_only_a_table_that_a_phone_would_scroll_is_a_stop_of_the_keyboard():
    small, wide = (table("caption", ["a"] * n, [["x"] * n]) for n in (3, 4))
    assert "tabindex" not in small and 'tabindex="0"' in wide and 'aria-label="caption"' in wide

"""Text from data, models and names acts nowhere: no escape reaches the screen, no markup rich, no element or attribute the pages."""

import io
import json
import re
import time
from typing import Any

import pytest
from rich.console import Console

from qlora_lite import show
from qlora_lite.show import phases, tables, text
from qlora_lite.show.plan_page import render_plan
from tests.security.whole_run import HOSTILE, WholeRun, whole_run
from tests.show.parsed import Parsed
from tests.show.run_files import make_plan, write_run

ACTS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
TAGS_OF_OUR_PAGES = set(
    "html head meta title style body header main nav footer section div p span h1 h2 h3 a ul ol li dl dt dd table caption thead tbody tr "
    "th td figure figcaption details summary small i b em strong code pre br wbr svg g rect line polyline circle path text tspan".split()
)


def acts_nowhere(source: str) -> None:
    """A page with the elements of ours alone, and no attribute that runs, loads or leads anywhere."""
    page = Parsed(source)
    assert set(page.tags) <= TAGS_OF_OUR_PAGES
    names = {name for _, attributes in page.elements for name in attributes}
    loading = ("src", "srcset", "action", "formaction", "xlink:href", "poster", "data")
    assert [name for name in names if name.startswith("on") or name in loading] == []
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    assert [page.tags.count(tag) for tag in ("title", "style", "body", "h1")] == [1, 1, 1, 1]
    assert all(re.fullmatch(r"[a-z-]+: [\d.]+%", style) for _, each in page.elements if (style := each.get("style")))
    assert ACTS.search(source) is None


@pytest.fixture(scope="module")
def run() -> WholeRun:
    return whole_run()


@pytest.mark.slow
def test_no_verb_shows_a_control_character_of_data_model_or_name(run):
    shown = run.output.decode("utf-8")
    assert [shown[max(0, match.start() - 80) : match.end()] for match in ACTS.finditer(shown)] == []


@pytest.mark.slow
def test_hostile_text_was_shown_and_is_only_text(run):
    """Else the test above would hold of a program that shows nothing."""
    shown = "".join(run.output.decode("utf-8").split())  # tables wrap
    for words in (*HOSTILE[1:3], "gnp.exe", "<imgsrc=xonerror=y>"):
        assert words in shown
    assert "owned" not in [path.name for path in run.folder.rglob("*")]  # $(touch owned)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1], ids=["page of the plan", "report"])
def test_a_page_holds_no_element_or_attribute_of_the_data(run, index):
    acts_nowhere(run.pages[index].read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_report_shows_hostile_questions_as_text(run):
    words = Parsed(run.pages[1].read_text(encoding="utf-8")).words
    for hostile in (*HOSTILE[1:4], "gnp.exe"):
        assert hostile in words


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal without colours: every escape that is written to it is a cursor's, or the data's."""
    stream = io.StringIO()
    fake = Console(
        file=stream, force_terminal=True, no_color=True, markup=False, highlight=False, emoji=False, width=400
    )
    for module in (text, phases, tables):
        monkeypatch.setattr(module, "console", lambda: fake)
    return stream


@pytest.mark.parametrize("name", ["reading [/red] a.yaml", "reading [link=http://evil]a[/link]", "reading [red]a"])
def test_a_phase_on_a_terminal_reads_no_markup(terminal, name):
    with show.phase(name) as current:
        current.progress(1, 2)
        current.live.refresh() if hasattr(current.live, "refresh") else time.sleep(0.2)
    assert name in terminal.getvalue() and f"{name}: 1 of 2" in terminal.getvalue()
    assert "\x1b]8;" not in terminal.getvalue()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_streamed_answer_cannot_act_however_it_is_cut(terminal, hostile):
    assert show.stream_answer("base", iter(hostile)) == hostile
    assert re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()).startswith("base: ")
    written = re.sub(r"\x1b\[(1|0)m", "", terminal.getvalue())  # our own bold
    assert ACTS.search(written) is None


@pytest.mark.parametrize("hostile", HOSTILE)
def test_trained_tokens_cannot_act_however_they_are_cut(hostile):
    marked = tables.mark_trained([(letter, index % 2 == 0) for index, letter in enumerate(hostile)], with_colour=False)
    assert ACTS.search(marked.plain) is None


@pytest.mark.parametrize(
    "beginning", ["\x9d", "\x90", "\x1b]", "\x1bP", "\x9b", "\x1b[", "\x1b ", "\x9d\x1b]", "\x9b0", "\x9e\x9f"]
)
def test_a_megabyte_of_beginnings_is_cleaned_in_no_time(beginning):
    """Each could look for its end to the end of the text: with 100,000 of them that would be minutes."""
    begin = time.perf_counter()
    assert ACTS.search(show.safe_text(beginning * 100_000)) is None
    assert time.perf_counter() - begin < 5.0


def test_what_is_left_after_cleaning_is_clean_again():
    for inside in HOSTILE:
        for outside in HOSTILE:
            for cut in range(len(outside) + 1):
                once = show.safe_text(outside[:cut] + inside + outside[cut:])
                assert ACTS.search(once) is None and show.safe_text(once) == once


def poisoned(value: Any, text: str, *, numbers: bool) -> Any:
    """`value` with `text` in every string and, doubled under a hostile name, behind every key; with `numbers`, instead of every number."""
    if isinstance(value, dict):
        inner = {key: poisoned(item, text, numbers=numbers) for key, item in value.items()}
        return inner | {f"{key}{text}": item for key, item in inner.items()}
    if isinstance(value, list):
        return [poisoned(item, text, numbers=numbers) for item in value]
    if isinstance(value, str) or (numbers and isinstance(value, int | float)):
        return f"{value}{text}"
    return value


@pytest.mark.parametrize("numbers", [False, True], ids=["texts", "numbers too"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_run_folder_of_a_stranger_makes_a_page_that_does_nothing(tmp_path, capsys, hostile, numbers):
    run = write_run(tmp_path / "run")
    for path in run.glob("*.json*"):
        documents = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps(poisoned(each, hostile, numbers=numbers)) for each in documents))
    (run / "recipe.yaml").write_text(f"method: {json.dumps(f'qlora{hostile}')}\n{json.dumps(hostile)}: 1\n")
    source = show.render_report(run)
    show.show_run(run)
    acts_nowhere(source)
    assert ACTS.search(capsys.readouterr().err) is None


@pytest.mark.parametrize("numbers", [False, True], ids=["texts", "numbers too"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_plan_with_hostile_text_makes_a_page_that_does_nothing(hostile, numbers):
    acts_nowhere(render_plan(poisoned(make_plan(), hostile, numbers=numbers)))

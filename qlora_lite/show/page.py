"""A page: its shell, and the few pieces of HTML that make up the report of a run and the page of a plan.

One file without scripts, fonts or images; it loads nothing, and its own content policy forbids loading. Every piece is `Html`; any other
value is foreign text: control characters are removed, then it is escaped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from qlora_lite.errors import RunError
from qlora_lite.show.rows import looks_like_numbers
from qlora_lite.show.text import safe_text

_NUM_COLUMNS_OF_A_PHONE = 3  # with more, a narrow screen scrolls the table sideways


class Html(str):
    """A piece of a page, already escaped."""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading in the table of contents; omitted when its body is empty."""

    anchor: str
    title: str
    body: str


@dataclass(frozen=True)
class Figure:
    """One of the few numbers at the top of a page: `Figure("peak memory", "368 MiB", "85% less than full fine-tuning")`."""

    label: str
    value: str
    remark: str = ""


def write_page(path: Path | str, page: Html) -> Path:
    """Write or replace the file atomically. Raises RunError when it cannot be written."""
    path = Path(path)
    staged = path.with_name(f".{path.name}.part")
    try:
        staged.write_text(page, encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def render_page(title: str, *, kind: str, lead: Html, sections: Sequence[Section]) -> Html:
    """The whole page: `lead` summarizes the sections in a few sentences."""
    shown = [section for section in sections if section.body]
    links = join(Html(f'<li><a href="#{section.anchor}">{html(section.title)}</a></li>') for section in shown)
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(shown) > 1 else ""
    body = "\n".join(_section(section) for section in shown)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return Html(
        _SHELL.format(style=style, title=html(title), kind=html(kind), lead=lead, nav=nav, body=body)
    )  # format makes one pass, so braces in data stay


def html(value: object) -> Html:
    """Escape text; return `Html` unchanged."""
    return value if isinstance(value, Html) else Html(escape(safe_text(value)))


def join(pieces: Iterable[object], *, by: str = "") -> Html:
    return Html(by.join(html(piece) for piece in pieces))


def paragraph(*words: object) -> Html:
    """A paragraph of sentences; "" when there are none."""
    words = tuple(word for word in words if word)
    return Html(f"<p>{join(words, by=' ')}</p>") if words else Html()


def note(*words: object) -> Html:
    """A remark in small print; "" when there are no words."""
    return Html(f'<p class="note">{join(words, by=" ")}</p>') if any(words) else Html()


def heading(words: str) -> Html:
    """The heading of a part of a section."""
    return Html(f"<h3>{html(words)}</h3>")


def table(
    caption: str, columns: Sequence[object], rows: Sequence[Sequence[object]], *, last_is_total: bool = False
) -> Html:
    """A table with named columns; the first cell of each row is its heading. "" when there are no rows."""
    if not rows:
        return Html()
    cells = [[html(value) for value in row] for row in rows]
    numeric = [index > 0 and looks_like_numbers([row[index] for row in cells]) for index in range(len(columns))]
    kinds = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(f'<th scope="col"{kind}>{html(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
    lines = [_row(row, kinds, is_total=last_is_total and row is cells[-1]) for row in cells]
    whole = f"<table><caption>{html(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    if len(columns) <= _NUM_COLUMNS_OF_A_PHONE:
        return Html(f'<div class="wide">{whole}</div>')
    # A scrolling region must have a name and be reachable by keyboard.
    return Html(f'<div class="wide" role="region" tabindex="0" aria-label="{html(caption)}">{whole}</div>')


def figures(entries: Sequence[Figure]) -> Html:
    """The numbers at the top of a page, side by side."""
    items = join(
        Html(f"<div><dt>{html(figure.label)}</dt><dd>{html(figure.value)}</dd><dd>{html(figure.remark)}</dd></div>")
        for figure in entries
    )
    return Html(f'<dl class="figures">{items}</dl>') if entries else Html()


def drawing(svg: str, caption: object = "") -> Html:
    """A drawing with its caption below; "" without a drawing."""
    below = f"<figcaption>{html(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{svg}{below}</figure>") if svg else Html()


def details(summary: str, body: str) -> Html:
    """A part that is folded on the screen and open in print; "" without a body."""
    return Html(f"<details><summary>{html(summary)}</summary>{body}</details>") if body else Html()


def swatch(kind: str, number: int) -> Html:
    """The small numbered square that identifies a colour of a drawing."""
    return Html(f'<span class="swatch {kind}" aria-hidden="true">{number}</span>')


def share_bar(percent: float) -> Html:
    """A bar in a table cell, beside its number."""
    return Html(f'<span class="share" aria-hidden="true"><span style="width: {percent:.1f}%"></span></span>')


def _section(section: Section) -> str:
    heading_id = f"{section.anchor}-title"
    return (
        f'<section id="{section.anchor}" aria-labelledby="{heading_id}">'
        f'<h2 id="{heading_id}">{html(section.title)}</h2>{section.body}</section>'
    )


def _row(cells: Sequence[Html], kinds: Sequence[str], *, is_total: bool) -> str:
    first, *rest = cells
    data = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
    return f'<tr{" class=total" if is_total else ""}><th scope="row">{first}</th>{data}</tr>'


_SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the results</a>
<header>
<p class="kind">{kind}</p>
<h1>{title}</h1>
</header>
<main id="content" tabindex="-1">
<div class="lead">{lead}</div>
{nav}
{body}
</main>
<footer><p>Written by qlora_lite. This page is one file: it runs no script and loads nothing.</p></footer>
</body>
</html>
"""

"""The tables on the screen, one function each, on stderr. All text passes through `safe_text`. The rows come from rows.py.

On a terminal, trained tokens are coloured; elsewhere (a log, a pipe, NO_COLOR) they are between « and ».
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from qlora_lite.show import rows
from qlora_lite.show.lenient import dig
from qlora_lite.show.text import console, safe_text, say, say_warning
from qlora_lite.units import format_bytes, row_in_words


def show_table(
    title: str, columns: Sequence[str], lines: Iterable[Sequence[object]], *, last_is_total: bool = False
) -> None:
    """Show a plain table; nothing without lines. Columns of numbers or sizes are aligned right; None is a dash."""
    cells = [[_cell(value) for value in line] for line in lines]
    if not cells:
        return
    table = Table(title=Text(safe_text(title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        justify: JustifyMethod = "right" if rows.looks_like_numbers([row[index] for row in cells]) else "left"
        table.add_column(Text(safe_text(name)), justify=justify, overflow="fold")
    for index, row in enumerate(cells):
        is_total = last_is_total and index == len(cells) - 1
        table.add_row(
            *(Text(cell) for cell in row),
            style="bold" if is_total else "",
            end_section=last_is_total and index == len(cells) - 2,
        )
    console().print(table)


def show_memory(memory: Mapping[str, Any]) -> None:
    """`memory.json`: each part at the peak of a step, then the highest point of each phase; planned beside measured."""
    columns = ["", "planned", "measured", "difference"]
    show_table("memory at the peak of a step", columns, rows.part_rows(memory), last_is_total=True)
    show_table("peak in each phase of a step", columns, rows.phase_rows(memory))
    show_table("outside the peaks", ["", ""], rows.beside_rows(memory))
    for retry in rows.retries_of(memory):
        say_warning(f"retried: {retry}")


def show_plan(plan: Mapping[str, Any]) -> None:
    """Show the document of `plan --json`: reasons, methods side by side, limits, disk, memory by length and batch."""
    show_reasons(plan["reasons"])
    show_methods(plan["methods"])
    show_table(
        "limits of each method within the budget",
        ["", "longest sequence in tokens", "largest model"],
        rows.longest_rows(plan["methods"]),
    )
    show_table("on disk", rows.checkpoint_columns(plan), rows.checkpoint_rows(plan))
    show_table("host memory, merging", ["", "peak"], rows.merge_rows(plan.get("merge") or {}))
    show_table("changes to make it fit", ["", "saves", "peak then"], rows.concession_rows(plan.get("concessions")))
    show_memory_map(plan["grid"], budget_bytes=plan["budget_bytes"])


def show_methods(methods: Mapping[str, Any]) -> None:
    """`methods` of a plan's JSON side by side, part by part."""
    columns = ["", *rows.method_names(methods)]
    show_table("memory at the peak of a step", columns, rows.method_rows(methods), last_is_total=True)
    saved = rows.savings(*(dig(methods, name, "peak_bytes") for name in ("qlora", "full")))
    if saved:
        say(f"QLoRA saves {saved} against full", style="green")


def show_memory_map(grid: Sequence[Mapping[str, Any]], *, budget_bytes: int) -> None:
    """Lines are sequence lengths, columns are examples per micro-batch; a cell is the peak, marked where it does not fit."""
    batches, lines = rows.memory_map(grid)
    shown = [
        [f"{length:,}", *(f"{rows.size(cell['peak_bytes'])}{'' if cell['fits'] else ' x'}" if cell else "–" for cell in cells)]
        for length, cells in lines
    ]  # fmt: skip
    title = f"examples per micro-batch, by length in tokens (x: more than {format_bytes(budget_bytes)})"
    show_table(title, ["tokens", *map(str, batches)], shown)


def show_time(phases_s: Mapping[str, float], *, wall_s: float | None) -> None:
    """Show the time of a run by phase."""
    show_table("time", ["", "time", "share"], rows.time_rows(phases_s, wall_s), last_is_total=True)


def show_sweep(models: Sequence[Mapping[str, Any]]) -> None:
    """Show one line per model: its weights, and the longest sequence on each card."""
    cards = list(models[0]["max_seq_length"])
    shown = [
        [
            row["model"], f"{row['num_weights'] / 1e9:.2f}", rows.size(row["peak_bytes"]),
            *(row["max_seq_length"][card] or "–" for card in cards),
        ]
        for row in models
    ]  # fmt: skip
    heads = ["model", "billion weights", "peak at 1,024 tokens", *(f"{int(card) // 2**30} GiB" for card in cards)]
    show_table("longest sequence in tokens, QLoRA, one example per micro-batch", heads, shown)
    longer = [[row["model"], *(row["max_seq_length_with_homes"][card] or "–" for card in cards)] for row in models]
    title = "the same with layers in chunks, and parts of the model in host memory where that fits more (up to the context window)"
    show_table(title, ["model", *(f"{int(card) // 2**30} GiB" for card in cards)], longer)


def show_cards(cards: Sequence[Mapping[str, Any]]) -> None:
    """Show one line per card: its figures that plans use."""
    shown = [
        [
            card["name"], rows.size(card["memory_bytes"]), card["compute_capability"], card["dtype"], card["attention"],
            f"{card['operations_per_s'] / 1e12:.0f}", f"{card['memory_bytes_per_s'] / 1e9:,.0f}", card["power_w"],
        ]
        for card in cards
    ]  # fmt: skip
    heads = ["--card", "memory", "capability", "computes in", "attention", "TFLOP/s", "GB/s", "W"]
    show_table("cards for plan --card, with published figures", heads, shown)


def show_scores(
    before: Mapping[str, float | None] | None,
    after: Mapping[str, float | None] | None,
    *,
    groups: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None = None,
    title: str = "scores",
) -> None:
    """Exact match, F1 (both 0 to 100) and loss, before and after.

    `groups[name]["before" | "after"]` adds lines for a part of the questions, such as those in an untrained phrasing.
    Without scores before, there is one column.
    """
    lines = rows.score_rows(before or {}, after or {}) + rows.group_rows(groups or {})
    if any(old != "–" for _, old, _, _ in lines):
        show_table(title, ["", "before", "after", "change"], lines)
    else:
        show_table(title, ["", "score"], [(label, new) for label, _, new, _ in lines])


def show_truncation(lines: Sequence[Any], *, title: str = "truncation by sequence length") -> None:
    """Show the lines (dataclasses or mappings); the columns are their fields."""
    records = [
        dict(line) if isinstance(line, Mapping) else {f.name: getattr(line, f.name) for f in fields(line)}
        for line in lines
    ]
    if records:
        show_table(title, [rows.words(key) for key in records[0]], [list(record.values()) for record in records])


def show_rows(examples: Iterable[tuple[str, Sequence[tuple[str, bool]]]]) -> None:
    """Show rendered rows: (id, ((piece of text, is trained), ...)), trained pieces marked."""
    for row_id, pieces in examples:
        say(
            f"{row_in_words(safe_text(row_id, one_line=True))} (trained tokens {'coloured' if _has_colour() else 'between « and »'})",
            style="bold",
        )
        console().print(mark_trained(pieces, with_colour=_has_colour()), soft_wrap=True)
        say("")


def mark_trained(pieces: Sequence[tuple[str, bool]], *, with_colour: bool) -> Text:
    """Join the pieces to one text, runs of trained pieces coloured or between « and »."""
    text, previous = Text(), False
    for piece, trained in [*pieces, ("", False)]:
        if not with_colour and trained != previous:
            text.append("«" if trained else "»")
        text.append(safe_text(piece), style="black on green" if trained and with_colour else "")
        previous = trained
    return text


def show_proof(proof: Mapping[str, Any], *, title: str = "proof of the merge") -> None:
    """Show the difference between merged model and adapter model, relative to the adapter's effect (the fields of `merge --json`)."""
    show_table(title, ["", "value", "meaning"], rows.proof_rows(proof))


def show_answers(answers: Mapping[str, str | None], *, question: str = "") -> None:
    """Show the answers of base, adapter and merged model side by side; None for a model that does not exist."""
    show_table(
        safe_text(question, one_line=True),
        list(answers),
        [["no such model" if text is None else text.strip() for text in answers.values()]],
    )


def stream_answer(name: str, pieces: Iterable[str]) -> str:
    """Show an answer while it is generated; return the whole text unchanged."""
    console().print(Text(f"{safe_text(name)}: ", style="bold"), end="", soft_wrap=True)
    whole = []
    for piece in pieces:
        whole.append(piece)
        console().print(Text(safe_text(piece)), end="", soft_wrap=True)
    say("")
    return "".join(whole)


def show_reasons(reasons: Sequence[str], *, title: str = "automatic choices") -> None:
    """Show the settings left to `auto`, with their values and reasons: one line each."""
    if reasons:
        say(title, style="bold")
    for reason in reasons:
        say(f"  {safe_text(reason, one_line=True)}")


def show_findings(findings: Sequence[tuple[str, str, str, str]]) -> None:
    """Show (subject, level, state, advice) on a line each: level is ok, warning or problem; the advice, if any, is below."""
    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    for subject, level, state, advice in findings:
        say(f"{level:8} {safe_text(subject, one_line=True)}: {safe_text(state, one_line=True)}", style=colours[level])
        if advice:
            say(f"{'':8} {safe_text(advice, one_line=True)}")


def _has_colour() -> bool:
    return console().is_terminal and not console().no_color


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return safe_text(f"{value:.4g}" if isinstance(value, float) else value)

"""The tables on the screen, one function each. All go to stderr; all text in them passes `safe_text`.

On a terminal trained tokens are coloured; elsewhere (a log, a pipe, NO_COLOR) they stand between « and ».
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from qlora_lite.show.text import console, safe_text, say
from qlora_lite.units import format_bytes

SCORE_NAMES = {"exact_match": "exact match", "f1": "F1", "loss": "loss"}


def show_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, last_is_total: bool = False
) -> None:
    """A plain table. Columns whose every cell is a number or a size are aligned right; None is shown as a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    table = Table(title=Text(safe_text(title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        is_number = bool(cells) and all(row[index][:1].isdigit() or row[index][:1] in ("-", "+", "–") for row in cells)
        table.add_column(Text(safe_text(name)), justify="right" if is_number else "left", overflow="fold")
    for index, row in enumerate(cells):
        is_total = last_is_total and index == len(cells) - 1
        table.add_row(
            *(Text(cell) for cell in row),
            style="bold" if is_total else "",
            end_section=last_is_total and index == len(cells) - 2,
        )
    console().print(table)


def show_memory(columns: Mapping[str, Mapping[str, int]], *, totals: Mapping[str, int], title: str = "memory") -> None:
    """Bytes part by part: `columns[method][part]`, with `totals[method]`; the first method is ours, the last is what it is held against.

    Total rows are given, not summed: a measured peak is the allocator's, and its parts need not be complete.
    """
    methods = list(columns)
    parts = list(dict.fromkeys(part for column in columns.values() for part in column))
    rows: list[Sequence[object]] = [
        [_words(part), *(_bytes(columns[method].get(part)) for method in methods)] for part in parts
    ]
    rows.append(["total", *(_bytes(totals.get(method)) for method in methods)])
    show_table(title, ["", *methods], rows, last_is_total=True)
    saving = savings(totals, methods)
    if saving:
        say(f"saves {saving}", style="green")


def savings(totals: Mapping[str, int], methods: Sequence[str]) -> str:
    """`2.1 GiB (81%) against full` for the first method against the last, or "" when there is nothing to compare."""
    if len(methods) < 2 or not totals.get(methods[0]) or not totals.get(methods[-1]):
        return ""
    ours, theirs = totals[methods[0]], totals[methods[-1]]
    return f"{format_bytes(theirs - ours)} ({100 * (theirs - ours) / theirs:.0f}%) against {methods[-1]}"


def show_methods(methods: Mapping[str, tuple[int, int, Mapping[str, int]]]) -> None:
    """(peak bytes, host bytes, parts) of each method, side by side."""
    names = {"qlora": "QLoRA", "lora": "LoRA", "full": "full", "full_8bit": "full, 8-bit AdamW"}
    parts = [part for part in next(iter(methods.values()))[2] if any(found[2][part] for found in methods.values())]
    rows: list[Sequence[object]] = [
        [_words(part), *(_bytes(found[2][part]) for found in methods.values())] for part in parts
    ]
    if any(host for _, host, _ in methods.values()):
        rows.append(["(may page to the host)", *(_bytes(host or None) for _, host, _ in methods.values())])
    rows.append(["peak", *(_bytes(peak) for peak, _, _ in methods.values())])
    show_table("memory at the peak of a step", ["", *(names[name] for name in methods)], rows, last_is_total=True)
    peaks = {names[name]: peak for name, (peak, _, _) in methods.items()}
    say(f"QLoRA saves {savings(peaks, ['QLoRA', 'full'])}", style="green")


def show_fits(longest: Mapping[str, int | None], disk: Mapping[str, int]) -> None:
    """The longest sequence of each method, and what lies on disk."""
    shown = {"qlora": "QLoRA", "lora": "LoRA", "full": "full", "full_8bit": "full, 8-bit AdamW"}
    show_table(
        "longest sequence that fits",
        ["", "tokens"],
        [[shown[n], "none fits" if t is None else t] for n, t in longest.items()],
    )
    show_table(
        "on disk",
        ["", "one checkpoint", "ten"],
        [[_words(n), _bytes(size), _bytes(10 * size)] for n, size in disk.items()],
    )


def show_memory_map(cells: Sequence[Any], *, budget_bytes: int) -> None:
    """Rows are sequence lengths, columns are examples a micro-batch; a cell is its peak, marked where it does not fit."""
    batches = sorted({cell.batch for cell in cells})
    found = {(cell.max_seq_length, cell.batch): cell for cell in cells}
    rows = [
        [length, *(f"{_bytes(c.peak_bytes)}{'' if c.fits else ' x'}" for c in (found[length, b] for b in batches))]
        for length in sorted({cell.max_seq_length for cell in cells})
    ]
    title = f"examples a micro-batch, by length in tokens (x: more than {format_bytes(budget_bytes)})"
    show_table(title, ["tokens", *map(str, batches)], rows)


def show_sweep(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a model: its weights, and the longest sequence on each card."""
    cards = list(rows[0]["max_seq_length"])
    shown = [
        [
            row["model"], f"{row['num_weights'] / 1e9:.2f}", _bytes(row["peak_bytes"]),
            *(row["max_seq_length"][card] or "–" for card in cards),
        ]
        for row in rows
    ]  # fmt: skip
    heads = ["model", "billion weights", "peak at 1,024 tokens", *(f"{int(card) // 2**30} GiB" for card in cards)]
    show_table("longest sequence in tokens, QLoRA, one example a micro-batch", heads, shown)


def show_scores(
    before: Mapping[str, float | None] | None,
    after: Mapping[str, float | None] | None,
    *,
    groups: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None = None,
    title: str = "scores",
) -> None:
    """Exact match, F1 (both 0 to 100) and loss, before and after.

    `groups[name]["before" | "after"]` adds lines for a part of the questions, for instance those of an untrained phrasing.
    With nothing before there is one column of scores.
    """
    rows = score_rows(before or {}, after or {})
    for name, group in (groups or {}).items():
        for label, old, new, change in score_rows(group.get("before") or {}, group.get("after") or {}):
            rows.append((f"{name}: {label}", old, new, change))
    if any(old != "–" for _, old, _, _ in rows):
        show_table(title, ["", "before", "after", "change"], rows)
    else:
        show_table(title, ["", "score"], [(label, new) for label, _, new, _ in rows])


def score_rows(
    before: Mapping[str, float | None], after: Mapping[str, float | None]
) -> list[tuple[str, str, str, str]]:
    """Label, before, after and change, for every score that either side has."""
    rows = []
    for key, label in SCORE_NAMES.items():
        old, new = before.get(key), after.get(key)
        if old is None and new is None:
            continue
        digits = 3 if key == "loss" else 1
        change = "–" if old is None or new is None else f"{new - old:+.{digits}f}"
        rows.append((label, _number(old, digits), _number(new, digits), change))
    return rows


def show_truncation(lines: Sequence[Any], *, title: str = "what each sequence length would cut") -> None:
    """One row a line; the columns are the lines' own fields (dataclasses or mappings)."""
    rows = [
        dict(line) if isinstance(line, Mapping) else {f.name: getattr(line, f.name) for f in fields(line)}
        for line in lines
    ]
    if rows:
        show_table(title, [_words(key) for key in rows[0]], [list(row.values()) for row in rows])


def show_rows(rows: Iterable[tuple[str, Sequence[tuple[str, bool]]]]) -> None:
    """Rendered examples: (id, ((piece of text, whether it is trained), ...)), trained pieces marked."""
    for row_id, pieces in rows:
        say(
            f"row {safe_text(row_id, one_line=True)} (trained tokens {'coloured' if _has_colour() else 'between « and »'})",
            style="bold",
        )
        console().print(mark_trained(pieces, with_colour=_has_colour()), soft_wrap=True)
        say("")


def mark_trained(pieces: Sequence[tuple[str, bool]], *, with_colour: bool) -> Text:
    """The pieces joined to one text, runs of trained pieces coloured or put between « and »."""
    text, previous = Text(), False
    for piece, trained in [*pieces, ("", False)]:
        if not with_colour and trained != previous:
            text.append("«" if trained else "»")
        text.append(safe_text(piece), style="black on green" if trained and with_colour else "")
        previous = trained
    return text


def show_proof(proof: Mapping[str, Any], *, title: str = "proof of the merge") -> None:
    """What the merged model computes beside the adapter model, in parts of what the adapter changes (the fields of `merge --json`)."""
    show_table(title, ["", "value", "meaning"], proof_rows(proof))


def proof_rows(proof: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and meaning, for every field of a proof that is there."""
    known = (
        (
            "adapter_effect",
            "adapter's effect",
            "how far the adapter moves log-probabilities; the yardstick below",
            "{:.4g}",
        ),
        (
            "arithmetic_ratio",
            "arithmetic error",
            "merged in fp32 against the adapter model, relative to the effect; above 1% is refused",
            "{:.3%}",
        ),
        ("storage_ratio", "storage error", "what storing in 16 bits adds, relative to the effect", "{:.3%}"),
        ("ratio", "whole error", "the stored model against the adapter model, relative to the effect", "{:.3%}"),
    )
    rows = [
        (label, form.format(proof[key]), meaning)
        for key, label, meaning, form in known
        if isinstance(proof.get(key), (int, float))
    ]
    sizes = (("peak_host_bytes", "peak memory, merge"), ("proof_peak_host_bytes", "peak memory, proof"))
    return rows + [
        (label, format_bytes(proof[key]), "of the host")
        for key, label in sizes
        if isinstance(proof.get(key), (int, float))
    ]


def show_answers(answers: Mapping[str, str | None], *, question: str = "") -> None:
    """Answers of the base, the adapter and the merged model side by side; None for one that does not exist."""
    show_table(
        safe_text(question, one_line=True),
        list(answers),
        [["not there" if text is None else text.strip() for text in answers.values()]],
    )


def stream_answer(name: str, pieces: Iterable[str]) -> str:
    """Show an answer while it is generated; returns the whole text as the model gave it."""
    console().print(Text(f"{safe_text(name)}: ", style="bold"), end="", soft_wrap=True)
    whole = []
    for piece in pieces:
        whole.append(piece)
        console().print(Text(safe_text(piece)), end="", soft_wrap=True)
    say("")
    return "".join(whole)


def show_reasons(reasons: Sequence[str], *, title: str = "chosen by itself") -> None:
    """What was left to `auto`, what it became, and why: one line each."""
    if reasons:
        say(title, style="bold")
    for reason in reasons:
        say(f"  {safe_text(reason, one_line=True)}")


def show_findings(findings: Sequence[tuple[str, str, str, str]]) -> None:
    """(what, level, found, advice) a line: level is ok, warning or problem; what to do stands below, where there is something."""
    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    for what, level, found, advice in findings:
        say(f"{level:8} {safe_text(what, one_line=True)}: {safe_text(found, one_line=True)}", style=colours[level])
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


def _bytes(size: int | None) -> str:
    return "–" if size is None else format_bytes(size)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _words(key: str) -> str:
    """`quant_constants_bytes` -> `quant constants`."""
    return safe_text(key).removesuffix("_bytes").removeprefix("num_").replace("_", " ")

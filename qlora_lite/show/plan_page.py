"""One page about a plan, before any training: the document of `plan --json`, for people.

in    the JSON document of `plan`: methods, budget, grid of lengths and batches, checkpoint sizes, settings, reasons
out   one self-contained HTML file (page.py)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lite.show import rows, sections
from qlora_lite.show.lenient import dig, is_number, mapping, number
from qlora_lite.show.page import (
    Figure,
    Html,
    Section,
    figures,
    heading,
    html,
    join,
    paragraph,
    render_page,
    table,
    write_page,
)
from qlora_lite.show.rows import METHODS
from qlora_lite.show.sections import Decision
from qlora_lite.show.sharing import sharing


def write_plan_page(plan: Mapping[str, Any], path: Path | str, *, decisions: Sequence[Decision] | None = None) -> Path:
    """Write the page and return its path. Raises RunError when it cannot be written."""
    return write_page(path, render_plan(plan, decisions))


def render_plan(plan: Mapping[str, Any], decisions: Sequence[Decision] | None = None) -> Html:
    """Render the JSON document, and its `decisions` where the caller has the values; sections whose data are missing are omitted."""
    disk, chosen = sections.checkpoints(plan), join([sections.decisions(plan, decisions), sections.settings(plan)])
    return render_page(
        f"Memory plan: {plan.get('model') or 'a model'}",
        kind="qlora_lite · fine-tuning plan",
        lead=_lead(plan),
        sections=[
            Section("memory", "Memory, by method", _memory(plan)),
            Section("fits", "Sizes that fit", _sizes_that_fit(plan)),
            Section("sharing", "Shared prefixes", sharing(plan)),
            Section("disk", "Disk", disk),
            Section("decisions", "Decisions and settings", chosen),
        ],
    )


def _lead(plan: Mapping[str, Any]) -> Html:
    return join(
        [
            paragraph(
                "Fine-tuning trains an existing language model further, on your own examples.",
                "This page shows the memory that this needs, before any training: every operation of a training step was simulated",
                "without weights, and its memory was added up.",
            ),
            _answer(plan),
            figures(_figures(plan)),
        ]
    )


def _answer(plan: Mapping[str, Any]) -> Html:
    """One sentence: it fits, or it does not."""
    own = sections.own_method(plan)
    peak, budget = number(dig(plan, "methods", own, "peak_bytes")), number(plan.get("budget_bytes"))
    if peak is None or budget is None or own not in METHODS:
        return Html()
    name, meaning = METHODS[own]
    kind, verdict = ("good", "It fits.") if plan.get("fits") else ("bad", "It does not fit.")
    words = f"{name} ({meaning}) needs {rows.size(peak)} at its peak, and the budget is {rows.size(budget)}."
    return Html(f'<p><strong class="{kind}">{verdict}</strong> {html(words)}</p>')


def _figures(plan: Mapping[str, Any]) -> list[Figure]:
    own = sections.own_method(plan)
    ours, full = (number(dig(plan, "methods", key, "peak_bytes")) for key in (own, "full"))
    budget, longest = number(plan.get("budget_bytes")), plan.get("max_seq_length")
    share = f"{100 * ours / budget:.0f}% of the budget, {rows.size(budget)}" if ours and budget else ""
    tokens = f"{longest:,} tokens" if is_number(longest) else "none fits"
    entries = [
        Figure("Peak memory", rows.size(ours), share),
        Figure("Less than full fine-tuning", rows.savings(ours, full), f"which needs {rows.size(full)}"),
        Figure("Longest text", tokens, "for one example at a time; a token is a piece of a word"),
        _weights(plan),
    ]
    return [figure for figure in entries if figure.value not in ("", "–")]


def _weights(plan: Mapping[str, Any]) -> Figure:
    weights, trained = number(plan.get("num_weights")), number(plan.get("num_trained"))
    if not weights or not trained:
        return Figure("Trainable parameters", "")
    return Figure(
        "Trainable parameters", f"{trained / 1e6:,.1f} million", f"the model has {weights / 1e6:,.0f} million"
    )


def _memory(plan: Mapping[str, Any]) -> Html:
    """The methods, the meaning of the parts, and the phases of the plan's own method."""
    methods = mapping(plan.get("methods"))
    taken = sections.taken_parts(*(dig(method, "parts") for method in methods.values() if isinstance(method, dict)))
    parts = sections.legend(taken)
    phases = _phases(plan)
    return join(
        [
            sections.methods_side_by_side(plan),
            join([heading("Meaning of the parts"), parts]) if parts else "",
            join([heading("Phases of a step"), phases]) if phases else "",
            _merging(plan),
        ]
    )


def _phases(plan: Mapping[str, Any]) -> Html:
    """Peak memory in each phase of a step, by the plan's own method."""
    own = sections.own_method(plan)
    phases = mapping(dig(plan, "methods", own, "phases"))
    lines = [
        (sections.phase_with_meaning(name), rows.size(dig(phases, name, "peak_bytes")))
        for name in rows.in_order(phases, rows.PHASES)
    ]
    name = METHODS[own][0] if own in METHODS else own
    return table(f"Peak memory in each phase, {name}", ["phase", "peak"], lines)


def _merging(plan: Mapping[str, Any]) -> Html:
    """Host memory that a merge needs."""
    lines = rows.merge_rows(mapping(plan.get("merge")))
    if not lines:
        return Html()
    return join(
        [
            heading("Merging"),
            paragraph("After training, the change is added to the model's weights piece by piece, in host memory."),
            table("Peak host memory", ["step", "peak"], lines),
        ]
    )


def _sizes_that_fit(plan: Mapping[str, Any]) -> Html:
    """The longest text and the largest model of each method, and the map of lengths and batches."""
    methods = mapping(plan.get("methods"))
    longest = (
        rows.longest_rows(methods) if any("max_seq_length" in mapping(method) for method in methods.values()) else []
    )
    return join(
        [
            table(
                "Limits of each method within the budget",
                ["method", "longest text in tokens", "largest well-known model"],
                longest,
            ),
            _memory_map(plan),
        ]
    )


def _memory_map(plan: Mapping[str, Any]) -> Html:
    """Lengths downwards, micro-batch sizes to the right; each cell states whether it fits, and its colour shows it."""
    batches, lines = rows.memory_map(plan.get("grid"))
    own = sections.own_method(plan)
    name = METHODS[own][0] if own in METHODS else own
    caption = f"{name}: memory by text length in tokens (rows) and texts at once (columns)"
    shown = [(f"{length:,} tokens", *(_map_cell(cell) for cell in cells)) for length, cells in lines]
    columns = ["length", *(f"{batch} at once" for batch in batches)]
    return table(caption, columns, shown)


def _map_cell(cell: Mapping[str, Any] | None) -> Html:
    if cell is None:
        return Html("–")
    kind, words = ("good", "fits") if cell.get("fits") else ("bad", "does not fit")
    return Html(f'<span class="cell {kind}"><b>{rows.size(cell.get("peak_bytes"))}</b> {words}</span>')

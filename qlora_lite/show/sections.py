"""Sections that the page of a run and the page of a plan share: all of them show a plan's JSON.

Each takes the plan and returns Html, "" where the plan has no data for it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_lite.show import rows
from qlora_lite.show.bars import Bar, part_class, part_number, svg_bars
from qlora_lite.show.lenient import dig, is_number, mapping, number, numbers
from qlora_lite.show.page import Html, details, drawing, heading, html, join, note, paragraph, swatch, table
from qlora_lite.show.rows import METHODS, PARTS, PHASES, Row

Decision = tuple[str, str]  # (recipe key, "" if none; the value and its reason)

_KEYS_OF_PARTS = {name: key for key, (name, _) in PARTS.items()}


def own_method(plan: Mapping[str, Any]) -> str:
    """The method that the plan's settings ask for."""
    method = str(dig(plan, "settings", "method") or "qlora")
    is_8bit = method == "full" and dig(plan, "settings", "train", "optimizer") == "paged_adamw_8bit"
    return "full_8bit" if is_8bit else method


def methods_side_by_side(plan: Mapping[str, Any]) -> Html:
    """A bar and a column for each method, and the saving of the plan's own method."""
    methods = mapping(plan.get("methods"))
    keys, names = rows.in_order(methods, METHODS), rows.method_names(methods)
    lines = rows.method_rows(methods)
    if not lines:
        return Html()
    bars = [
        Bar(name, mapping(dig(methods, key, "parts")), number(dig(methods, key, "peak_bytes")))
        for key, name in zip(keys, names, strict=True)
    ]
    budget = number(plan.get("budget_bytes"))
    caption = "The same texts, trained with each method. The list of parts explains the numbers in the bars."
    return join(
        [
            paragraph(savings_in_words(plan)),
            drawing(svg_bars(bars, budget_bytes=budget), caption),
            table(
                "Memory at the peak of a step, by method",
                ["part", *names],
                with_swatches(lines),
                last_is_total=True,
            ),
            terms((METHODS[key][0], METHODS[key][1]) for key in keys if key in METHODS),
        ]
    )


def savings_in_words(plan: Mapping[str, Any]) -> str:
    """The saving against full fine-tuning in one sentence; "" where nothing is saved."""
    own = own_method(plan)
    own_bytes, full_bytes = (number(dig(plan, "methods", key, "peak_bytes")) for key in (own, "full"))
    saved = rows.savings(own_bytes, full_bytes)
    if not saved or own not in METHODS:
        return ""
    return f"{METHODS[own][0]} saves {saved} against full fine-tuning, which would need {rows.size(full_bytes)}."


def legend(parts: Iterable[str]) -> Html:
    """The meaning of the numbers in a bar, in the order of the bar."""
    shown = rows.in_order(dict.fromkeys(parts), PARTS)
    return terms((part_with_swatch(key), PARTS[key][1]) for key in shown if key in PARTS)


def taken_parts(*parts: Any) -> list[str]:
    """The parts of more than 0 bytes in at least one of the mappings."""
    return list(dict.fromkeys(key for sizes in parts for key, size in numbers(sizes).items() if size > 0))


def with_swatches(lines: Sequence[Row]) -> list[Sequence[object]]:
    """Rows of parts, each name with its colour and number in the bars."""
    return [(part_with_swatch(_KEYS_OF_PARTS.get(name, name)), *rest) for name, *rest in lines]


def part_with_swatch(key: str) -> Html:
    if key not in PARTS:
        return html(rows.part_name(key))
    words = html(rows.part_name(key))
    return Html(f'<span class="part">{swatch(part_class(key), part_number(key))}{words}</span>')


def phase_with_meaning(name: str) -> Html:
    meaning = PHASES[name][1] if name in PHASES else ""
    return join([name, Html(f"<small>{html(meaning)}</small>") if meaning else ""])


def terms(entries: Iterable[tuple[object, object]]) -> Html:
    """A list of words with their meanings."""
    items = join(Html(f"<div><dt>{html(word)}</dt><dd>{html(meaning)}</dd></div>") for word, meaning in entries)
    return Html(f'<dl class="terms">{items}</dl>') if items else Html()


def checkpoints(plan: Mapping[str, Any]) -> Html:
    """The size of checkpoints on disk: one, and ten."""
    sizes = numbers(plan.get("checkpoint_bytes"))
    full, adapter = sizes.get("full"), sizes.get("adapter")
    words = (
        f"An adapter takes {rows.size(adapter)} on disk, the whole model {rows.size(full)}: {full / adapter:,.0f} times as much."
        if full and adapter and full > adapter
        else ""
    )
    meaning = "A checkpoint is a saved state. Using the model needs the weights only; resuming training needs the optimizer's state too."
    caption = "Planned size of checkpoints on disk"
    sizes_table = table(caption, rows.checkpoint_columns(plan), rows.checkpoint_rows(plan))
    return join([paragraph(words, meaning), sizes_table]) if sizes else Html()


def decisions(plan: Mapping[str, Any], made: Sequence[Decision] | None = None) -> Html:
    """The choices with their reasons; the settings that were changed until it fits, and their cost in speed.

    Without `made`, the choices are read from the sentences of plan.json: `lora.r: 16: asked for`.
    """
    made = [_decision(sentence) for sentence in rows.reasons_of(plan)] if made is None else made
    chosen = [(breakable(key) if key else "in general", decision) for key, decision in made]
    slowdown = plan.get("slowdown")
    slower = f"A step takes about {slowdown:.2f} times as long as without these changes." if is_number(slowdown) else ""
    given_up = table(
        "Settings changed, one after the other, until it fits",
        ["setting", "saves", "peak then"],
        rows.concession_rows(plan.get("concessions")),
    )
    intro = paragraph("Settings that the recipe left open or that need an explanation, each with its reason.")
    return join(
        [
            join([intro, table("Decisions", ["setting", "decision and reason"], chosen)]) if chosen else "",
            join([heading("Changes to make it fit"), given_up]) if given_up else "",
            note(slower),
        ]
    )


def settings(plan: Mapping[str, Any]) -> Html:
    """All settings, on request."""
    pairs = [(breakable(name), value) for name, value in flat(mapping(plan.get("settings")))]
    return details("all settings", table("Settings", ["setting", "value"], pairs))


def flat(values: Mapping[str, Any], prefix: str = "", *, by: str = ".") -> list[tuple[str, str]]:
    """`{"lora": {"r": 16}}` -> `[("lora.r", "16")]`."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        pairs += flat(value, f"{name}{by}", by=by) if isinstance(value, dict) else [(name, in_words(value))]
    return pairs


def in_words(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(in_words(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def breakable(setting: str) -> Html:
    """A setting's name that a narrow screen may break at dots and underscores."""
    return Html(html(setting).replace(".", ".<wbr>").replace("_", "_<wbr>"))


def _decision(sentence: str) -> Decision:
    """`lora.r: 16: asked for` -> (the key, the rest)."""
    key, colon, rest = sentence.partition(": ")
    return (key, rest) if colon and " " not in key else ("", sentence)

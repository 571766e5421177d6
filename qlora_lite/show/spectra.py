"""The spectrum of an adapter's change, drawn: its spread over directions, kinds of modules and depth.

In: the document of `rank --json` (rank.json of a run). On the terminal, each kind of module is a line with its singular values as small
bars; on the page they are curves, with a table over depth.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from qlora_lite.show.curves import Line, svg_curve
from qlora_lite.show.lenient import is_number, mapping
from qlora_lite.show.page import Html, details, drawing, join, paragraph, table
from qlora_lite.show.rows import decimal
from qlora_lite.show.tables import show_table
from qlora_lite.show.text import safe_text
from qlora_lite.units import format_bytes

_BLOCKS = "▁▂▃▄▅▆▇█"
_NUM_BARS, _NUM_LAYERS = 16, 16  # at most, per line and per table
_COLUMNS = ("module", "number", "r", "effective rank", "50% in", "90% in", "99% in", "recommended r")


def show_spectra(report: Mapping[str, Any]) -> None:
    """Show `rank` on the terminal."""
    modules = _modules(report)
    lines = [[*line, bars(_typical(modules, line[0]))] for line in kind_rows(report)]
    show_table("learned change, by kind of module", [*_COLUMNS, "singular values"], lines)
    kinds, depth = depth_rows(modules)
    show_table("effective rank by depth", ["layer", *kinds], depth)
    show_table(
        "directions shared with the other adapter",
        ["directions", "read", "written", "by chance"],
        overlap_rows(report),
    )


def show_rank_curve(curve: Sequence[Mapping[str, Any]]) -> None:
    """Show `rank --try` on the terminal."""
    most = max((line["exact_match"] or 0 for line in curve), default=0) or 1
    lines = [
        (
            str(line["r"]),
            format_bytes(line["planned_peak_bytes"]),
            format_bytes(line["adapter_bytes"]),
            f"{line['train_s']:.0f} s",
            f"{line['loss']:.3f}",
            *((f"{line['exact_match']:.1f}", f"{line['f1']:.1f}") if line["exact_match"] is not None else ("–", "–")),
            "█" * round(24 * (line["exact_match"] or 0) / most),
        )
        for line in curve
    ]
    columns = ["r", "planned peak", "adapter", "training", "loss", "exact match", "F1", ""]
    show_table("result of each rank", columns, lines)


def show_scales(scales: Iterable[tuple[float, float, float | None, float | None]]) -> None:
    """Show `eval --scales` on the terminal: (scale, loss, exact match, F1) per line; the last two are None for plain text."""
    lines = [
        (f"{scale:g}", f"{loss:.3f}", decimal(exact_match, 1), decimal(f1, 1))
        for scale, loss, exact_match, f1 in scales
    ]
    show_table("scores by scale of the change", ["scale", "loss", "exact match", "F1"], lines)


def spectra_section(report: Mapping[str, Any]) -> Html:
    """The section of the page; "" for a run without rank.json."""
    modules = _modules(report)
    lines = kind_rows(report)
    if not modules or not lines:
        return Html()
    curves = [Line(list(enumerate(_typical(modules, kind[0]), 1)), "each") for kind in lines]
    every = [_normalized(module) for module in modules]
    width = min(map(len, every))
    curves.append(Line([(i + 1, median(values[i] for values in every)) for i in range(width)], "mean"))
    kinds, depth = depth_rows(modules)
    words = (
        "Fine-tuning changed each layer in a few directions. The curve shows the contribution of each further direction: if it falls "
        "quickly, a smaller rank would have been enough; if it stays high, a larger rank may learn more."
    )
    caption = "Size of each direction, the largest as 1. Thin: one kind of module. Thick: all kinds."
    return join(
        [
            paragraph(words, str(report.get("advice") or "")),
            drawing(svg_curve(curves, label="singular values of the change, the largest as 1"), caption),
            table("By kind of module", list(_COLUMNS), lines),
            details("effective rank by depth", table("Effective rank by depth", ["layer", *kinds], depth)),
        ]
    )


def kind_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line for each kind of module, in the columns `_COLUMNS`."""
    lines = []
    for kind in map(mapping, report.get("kinds") or []):
        ranks = mapping(kind.get("energy_ranks"))
        if is_number(kind.get("effective_rank")):
            energies = [str(ranks.get(share, "–")) for share in ("50%", "90%", "99%")]
            numbers = [str(kind.get("num_modules")), str(kind.get("r")), f"{kind['effective_rank']:.1f}", *energies]
            lines.append((safe_text(kind.get("kind")), *numbers, str(kind.get("recommended_r"))))
    return lines


def depth_rows(modules: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """-> (kinds, a line for each of at most 16 layers: the effective rank of each kind)."""
    ranks = {(m["layer"], safe_text(m["kind"])): m["effective_rank"] for m in modules if m.get("layer") is not None}
    kinds = list(dict.fromkeys(kind for _, kind in ranks))
    layers = sorted({layer for layer, _ in ranks})
    step = max(1, -(-len(layers) // _NUM_LAYERS))
    return kinds, [
        (str(layer), *(f"{ranks[layer, kind]:.1f}" if (layer, kind) in ranks else "–" for kind in kinds))
        for layer in layers[::step]
    ]


def overlap_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (str(overlap["k"]), f"{overlap['inputs']:.2f}", f"{overlap['outputs']:.2f}", f"{overlap['by_chance']:.2f}")
        for overlap in report.get("overlap") or []
    ]


def bars(values: Sequence[float]) -> str:
    """At most 16 of the values as block characters, the largest as a full block."""
    step = max(1, -(-len(values) // _NUM_BARS))
    return "".join(_BLOCKS[min(7, int(8 * value))] for value in values[::step])


def _modules(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The modules whose entries can be drawn; damaged ones are omitted."""
    modules = map(mapping, report.get("modules") or [])
    return [
        dict(module)
        for module in modules
        if is_number(module.get("effective_rank")) and all(map(is_number, module.get("singular_values") or [None]))
    ]


def _typical(modules: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    """Each singular value, the largest as 1: the median over the modules of a kind."""
    every = [_normalized(module) for module in modules if safe_text(module.get("kind")) == kind]
    return [median(values[i] for values in every) for i in range(min(map(len, every), default=0))]


def _normalized(module: Mapping[str, Any]) -> list[float]:
    values = module["singular_values"]
    return [value / values[0] if values[0] > 0 else 0.0 for value in values]

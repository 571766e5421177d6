"""What an adapter has learned, drawn: how its change spreads over directions, kinds of modules and depth.

In: what `rank --json` prints (rank.json of a run). On the terminal each kind of module is a row with its singular values as small bars; on
the page they are curves, and a table over depth.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from qlora_lite.show.curves import Line, svg_curve
from qlora_lite.show.lenient import is_number, mapping
from qlora_lite.show.page import Html, details, drawing, join, paragraph, table
from qlora_lite.show.tables import show_table
from qlora_lite.show.text import safe_text
from qlora_lite.units import format_bytes

_BLOCKS = "▁▂▃▄▅▆▇█"
_NUM_BARS, _NUM_LAYERS = 16, 16  # at most, on a row and in a table
_COLUMNS = ("module", "number", "r", "effective rank", "50% in", "90% in", "99% in", "recommended r")


def show_spectra(report: Mapping[str, Any]) -> None:
    """`rank` on the terminal."""
    modules = _modules(report)
    lines = [[*line, bars(_typical(modules, line[0]))] for line in kind_rows(report)]
    show_table("what was learned, by kind of module", [*_COLUMNS, "singular values"], lines)
    kinds, depth = depth_rows(modules)
    show_table("effective rank by depth", ["layer", *kinds], depth)
    show_table(
        "directions in common with the other adapter",
        ["directions", "read", "written", "by chance"],
        overlap_rows(report),
    )


def show_rank_curve(curve: Sequence[Mapping[str, Any]]) -> None:
    """`rank --try` on the terminal."""
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
    show_table("what each rank learns", columns, lines)


def show_scales(scales: Sequence[Mapping[str, Any]]) -> None:
    """`eval --scales` on the terminal."""
    lines = [
        (
            f"{line['scale']:g}",
            f"{line['loss']:.3f}",
            *((f"{line['exact_match']:.1f}", f"{line['f1']:.1f}") if line["exact_match"] is not None else ("–", "–")),
        )
        for line in scales
    ]
    show_table("the change at other scales", ["scale", "loss", "exact match", "F1"], lines)


def spectra_section(report: Mapping[str, Any]) -> Html:
    """For the page; "" for a run whose rank was not looked at."""
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
        "Fine-tuning changed each layer in a few directions. The curve says how much each further direction adds: where it falls "
        "quickly, a smaller rank would have been enough; where it stays up, a larger one may learn more."
    )
    caption = "Size of each direction, the largest as 1. Thin: a kind of module. Thick: all of them."
    return join(
        [
            paragraph(words, str(report.get("advice") or "")),
            drawing(svg_curve(curves, label="singular values of the change, the largest as 1"), caption),
            table("By kind of module", list(_COLUMNS), lines),
            details("effective rank by depth", table("Effective rank by depth", ["layer", *kinds], depth)),
        ]
    )


def kind_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line for each kind of module, as `_COLUMNS` has it."""
    found = []
    for kind in (mapping(each) for each in report.get("kinds") or []):
        ranks = mapping(kind.get("energy_ranks"))
        if is_number(kind.get("effective_rank")):
            energies = [str(ranks.get(share, "–")) for share in ("50%", "90%", "99%")]
            numbers = [str(kind.get("num_modules")), str(kind.get("r")), f"{kind['effective_rank']:.1f}", *energies]
            found.append((safe_text(kind.get("kind")), *numbers, str(kind.get("recommended_r"))))
    return found


def depth_rows(modules: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """-> the kinds, and a line for each of at most 16 layers: the effective rank of each kind there."""
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
        (str(each["k"]), f"{each['inputs']:.2f}", f"{each['outputs']:.2f}", f"{each['by_chance']:.2f}")
        for each in report.get("overlap") or []
    ]


def bars(values: Sequence[float]) -> str:
    """At most 16 of them as block characters, the largest as a full one."""
    step = max(1, -(-len(values) // _NUM_BARS))
    return "".join(_BLOCKS[min(7, int(8 * value))] for value in values[::step])


def _modules(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those whose entries can be drawn: a damaged file is shown as far as it can be read."""
    found = (mapping(each) for each in report.get("modules") or [])
    return [
        dict(each)
        for each in found
        if is_number(each.get("effective_rank")) and all(map(is_number, each.get("singular_values") or [None]))
    ]


def _typical(modules: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    """Median over the modules of a kind of each singular value, the largest as 1."""
    every = [_normalized(module) for module in modules if safe_text(module.get("kind")) == kind]
    return [median(values[i] for values in every) for i in range(min(map(len, every), default=0))]


def _normalized(module: Mapping[str, Any]) -> list[float]:
    values = module["singular_values"]
    return [value / values[0] if values[0] > 0 else 0.0 for value in values]

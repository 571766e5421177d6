"""The rows that the screen and the page both show: plain values in, words out, so that both say the same.

Documents are those of a run directory (`eval.json`, `memory.json`, `merge.json`, `plan.json`); sizes in them are bytes. What is
missing or no number is a dash.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_lite.show.lenient import dig, is_number, mapping, mappings, number, numbers
from qlora_lite.show.text import safe_text
from qlora_lite.units import format_bytes, format_seconds

Row = tuple[str, ...]

SCORES = {
    "exact_match": ("exact match", "share of questions whose answer is word for word right, from 0 to 100"),
    "f1": ("F1", "how far the words of the answer and of the right one overlap, from 0 to 100"),
    "loss": ("loss", "how surprised the model is by the right answer; lower is better, 0 is none"),
}
_LEFT_OUT = {
    "too_long": "rows that are longer than eval.max_seq_length",
    "unusable": "rows that cannot be used",
    "beyond_limit": "rows beyond eval.num_examples",
}
METHODS = {
    "qlora": ("QLoRA", "the base in 4 bits, only an adapter is trained"),
    "lora": ("LoRA", "the base in 16 bits, only an adapter is trained"),
    "full_8bit": ("full, 8-bit AdamW", "every weight is trained, with a small optimizer state"),
    "full": ("full", "every weight is trained"),
}
PARTS = {
    "weights_bytes": ("weights", "the base model's numbers, which stay as they are unless every weight is trained"),
    "quant_constants_bytes": ("quant constants", "the scales that turn 4-bit weights back into numbers"),
    "adapter_bytes": ("adapter", "the small addition that is trained"),
    "gradients_bytes": ("gradients", "for every trained number, in which direction it should move"),
    "optimizer_bytes": ("optimizer", "what AdamW remembers of earlier gradients"),
    "activations_bytes": ("activations", "what each layer computed, kept until the way back"),
    "recompute_bytes": ("recompute", "one layer's activations, computed again instead of kept"),
    "logits_bytes": ("logits", "a score for each word of the vocabulary, at every trained position"),
    "workspace_bytes": ("workspace", "scratch room of single operations"),
    "runtime_bytes": ("runtime", "what torch and the driver take for themselves"),
}
PHASES = {
    "forward": ("forward", "the model reads a text, layer by layer"),
    "head": ("head", "its guesses are compared with the answer"),
    "backward": ("backward", "the error goes back through the layers"),
    "update": ("update", "the optimizer moves the trained numbers"),
    "evaluate": ("evaluate", "answers are written and scored, nothing is trained"),
}
_PROOF = {
    "adapter_effect": ("adapter's effect", "how far the adapter moves log-probabilities; the yardstick below", ".4g"),
    "arithmetic_ratio": (
        "arithmetic error",
        "merged in fp32 against the adapter model, relative to the effect; above 1% is refused",
        ".3%",
    ),
    "storage_ratio": ("storage error", "what storing in 16 bits adds, relative to the effect", ".3%"),
    "ratio": ("whole error", "the stored model against the adapter model, relative to the effect", ".3%"),
}
_CHECKPOINTS = {
    "adapter": "adapter, to use",
    "adapter_resume": "adapter, to train on",
    "full": "whole model in 16 bits, to use",
    "full_resume": "whole model, to train on",
}


_ALLOCATOR = {  # key -> (name, whether it is in bytes)
    "reserved_bytes": ("taken from the card by the allocator", True),
    "largest_free_bytes": ("its largest free block", True),
    "num_retries": ("times it had to give back what it kept", False),
    "num_out_of_memory": ("times the card had nothing left", False),
}


def score_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Row]:
    """Label, before, after and change, for every score that either side has."""
    rows: list[Row] = []
    for key, (label, _) in SCORES.items():
        old, new = number(before.get(key)), number(after.get(key))
        if old is None and new is None:
            continue
        digits = 3 if key == "loss" else 1
        change = "–" if old is None or new is None else f"{new - old:+.{digits}f}"
        rows.append((label, decimal(old, digits), decimal(new, digits), change))
    return rows


def left_out(scores: Mapping[str, Any]) -> list[str]:
    """Of eval.json: which held-out rows were not scored, a sentence; none where all were."""
    result = mapping(scores.get("after")) or mapping(scores.get("before"))
    found = numbers(mapping(result.get("left_out")))
    named = [f"{found[key]:,.0f} {why}" for key, why in _LEFT_OUT.items() if found.get(key)]
    scored = number(result.get("num_examples"))
    if not named:
        return []
    return [f"Not scored: {', '.join(named)}." + (f" Scored: {scored:,.0f}." if scored is not None else "")]


def group_rows(groups: Mapping[str, Any]) -> list[Row]:
    """`score_rows` of each of `groups[name]["before" | "after"]`, the name before the label."""
    return [
        (f"{name}: {label}", *rest)
        for name, group in groups.items()
        for label, *rest in score_rows(mapping(dig(mapping(group), "before")), mapping(dig(mapping(group), "after")))
    ]


def part_rows(memory: Mapping[str, Any]) -> list[Row]:
    """Part, planned, measured and difference; parts that take nothing are left out. The last row is the peak.

    The peak is given, not summed: a measured one is the allocator's, and its parts need not be complete.
    """
    parts = {key: mapping(part) for key, part in mapping(memory.get("parts")).items()}
    taken = {key: part for key, part in parts.items() if any(numbers(part).values())}
    rows = [_planned_and_measured(part_name(key), taken[key]) for key in in_order(taken, PARTS)]
    peak = mapping(memory.get("peak_bytes"))
    return [*rows, _planned_and_measured("peak", peak)] if rows or peak else []


def phase_rows(memory: Mapping[str, Any]) -> list[Row]:
    """Phase, planned, measured and difference of the highest point in each phase of a step."""
    phases = mapping(memory.get("phases"))
    return [_planned_and_measured(key.replace("_", " "), mapping(phases[key])) for key in in_order(phases, PHASES)]


def beside_rows(memory: Mapping[str, Any]) -> list[Row]:
    """What no peak shows: managed memory, and what the card's allocator says of itself."""
    paged, allocator = mapping(memory.get("paged_bytes")), mapping(memory.get("allocator"))
    lines: list[Row] = (
        [("optimizer state that may page to the host", size(paged["measured"]))] if paged.get("measured") else []
    )
    for key, (name, is_size) in _ALLOCATOR.items():
        if is_number(allocator.get(key)):
            lines.append((name, size(allocator[key]) if is_size else f"{allocator[key]:,}"))
    return lines


def method_rows(methods: Mapping[str, Any]) -> list[Row]:
    """Part by part, one column a method as in `method_names`; then what may page to the host, and the peak."""
    found = [mapping(methods[key]) for key in in_order(methods, METHODS)]
    parts = [mapping(method.get("parts")) for method in found]
    taken = dict.fromkeys(key for part in parts for key, size in part.items() if is_number(size) and size)
    rows: list[Row] = [
        (part_name(key), *(size(part.get(key) or None) for part in parts)) for key in in_order(taken, PARTS)
    ]
    hosts = [number(method.get("host_bytes")) for method in found]
    if any(hosts):
        rows.append(("(may page to the host)", *(size(host or None) for host in hosts)))
    return [*rows, ("peak", *(size(method.get("peak_bytes")) for method in found))] if found else []


def method_names(methods: Mapping[str, Any]) -> list[str]:
    return [METHODS[key][0] if key in METHODS else key for key in in_order(methods, METHODS)]


def longest_rows(methods: Mapping[str, Any]) -> list[Row]:
    """Method, the longest text in tokens that it can train on within the budget, and the largest well-known model that it could."""
    keys = in_order(methods, METHODS)
    longest = [dig(methods, key, "max_seq_length") for key in keys]
    shown = [f"{tokens:,}" if is_number(tokens) else "none fits" for tokens in longest]
    largest = [safe_text(mapping(methods[key]).get("largest_model", "–") or "none fits") for key in keys]
    return list(zip(method_names(methods), shown, largest, strict=True))


def merge_rows(merge: Mapping[str, Any]) -> list[Row]:
    """What merging will take of the machine's memory, whatever the card."""
    steps = {"peak_host_bytes": "writing the merged checkpoint", "proof_peak_host_bytes": "proving it"}
    return [(name, size(merge[key])) for key, name in steps.items() if is_number(merge.get(key))]


def memory_map(grid: Any) -> tuple[list[int], list[tuple[int, list[dict[str, Any] | None]]]]:
    """The batches, and for each length its cells in their order (None where there is none)."""
    found = {
        (cell["max_seq_length"], cell["batch"]): cell
        for cell in mappings(grid)
        if is_number(cell.get("max_seq_length")) and is_number(cell.get("batch"))
    }
    batches = sorted({batch for _, batch in found})
    lengths = sorted({length for length, _ in found})
    return batches, [(length, [found.get((length, batch)) for batch in batches]) for length in lengths]


def checkpoint_columns(plan: Mapping[str, Any]) -> list[str]:
    """Of `checkpoint_rows`."""
    return ["checkpoint", "one", "ten"] + (["to write one", "to write ten"] if _disk_speed(plan) else [])


def checkpoint_rows(plan: Mapping[str, Any]) -> list[Row]:
    """Kind of checkpoint, what one and ten take on disk, and how long by the disk's measured speed; then adapters of other ranks."""
    sizes = numbers(mapping(plan.get("checkpoint_bytes")))
    named = [(_CHECKPOINTS.get(key, words(key)), sizes[key]) for key in in_order(sizes, _CHECKPOINTS)]
    ranks = numbers(mapping(plan.get("adapter_bytes")))
    named += [
        (f"an adapter of rank {safe_text(r)}", num_bytes)
        for r, num_bytes in ranks.items()
        if num_bytes != sizes.get("adapter")
    ]
    speed = _disk_speed(plan)
    return [
        (
            name,
            *(size(count * num_bytes) for count in (1, 10)),
            *(_writing(count * num_bytes / speed) for count in (1, 10) if speed),
        )
        for name, num_bytes in named
    ]


def _writing(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 1 else format_seconds(seconds)


def _disk_speed(plan: Mapping[str, Any]) -> float | None:
    speed = number(plan.get("disk_write_bytes_per_s"))
    return speed if speed and speed > 0 else None


def time_rows(phases_s: Mapping[str, Any], wall_s: float | None) -> list[Row]:
    """Phase, its time, its share of the whole; what no phase accounts for is "everything else"."""
    spent = numbers(phases_s)
    whole = max(wall_s or 0.0, sum(spent.values()))
    rest = whole - sum(spent.values())
    spent |= {"everything else": rest} if rest > 0.01 * whole else {}
    rows: list[Row] = [
        (name, format_seconds(seconds), f"{100 * seconds / whole:.0f}%") for name, seconds in spent.items() if whole
    ]
    return [*rows, ("in all", format_seconds(whole), "100%")] if rows else []


def phases_of(train: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase of `train.json`; where it names none, of the training."""
    phases_s = numbers(train.get("phases_s"))
    return phases_s or {name: s for name, s in {"training": number(train.get("train_s"))}.items() if s}


def disk_rows(disk: Sequence[tuple[str, int]]) -> list[Row]:
    """Folder and its size; the last row is the whole."""
    rows: list[Row] = [(name, size(num_bytes)) for name, num_bytes in disk]
    return [*rows, ("in all", size(sum(num_bytes for _, num_bytes in disk)))] if rows else []


def retries_of(memory: Mapping[str, Any]) -> list[str]:
    """What did not fit at first, and what did then."""
    retries = memory.get("retries")
    return [str(retry) for retry in retries] if isinstance(retries, list) else []


def reasons_of(plan: Mapping[str, Any]) -> list[str]:
    """Why the plan's settings are what they are, one line each."""
    reasons = plan.get("reasons")
    return [str(reason) for reason in reasons] if isinstance(reasons, list) else []


def concession_rows(concessions: Any) -> list[Row]:
    """Setting, what it saves, and the peak with it; in the order in which they were made."""
    return [
        (
            str(concession.get("setting", "–")),
            size(concession.get("saves_bytes")),
            size(concession.get("peak_bytes")),
        )
        for concession in mappings(concessions)
    ]


def savings(ours: float | None, theirs: float | None) -> str:
    """`2.1 GiB (81%)`: what `ours` is below `theirs`; "" when there is nothing to compare or nothing saved."""
    if not ours or not theirs or ours >= theirs:
        return ""
    return f"{format_bytes(theirs - ours)} ({100 * (theirs - ours) / theirs:.0f}%)"


def proof_rows(proof: Mapping[str, Any]) -> list[Row]:
    """Label, value and meaning, for every field of a proof that is there."""
    shown: list[Row] = [
        (label, f"{proof[key]:{form}}", meaning)
        for key, (label, meaning, form) in _PROOF.items()
        if is_number(proof.get(key))
    ]
    sizes = (("peak_host_bytes", "peak memory, merge"), ("proof_peak_host_bytes", "peak memory, proof"))
    return shown + [(label, size(proof[key]), "of the host") for key, label in sizes if is_number(proof.get(key))]


def in_order(found: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The keys of `found`: those that are known in their usual order, then the others."""
    return [key for key in known if key in found] + [key for key in found if key not in known]


def part_name(key: str) -> str:
    return PARTS[key][0] if key in PARTS else words(key)


def words(key: str) -> str:
    """`quant_constants_bytes` -> `quant constants`."""
    return safe_text(key).removesuffix("_bytes").removeprefix("num_").replace("_", " ")


def size(num_bytes: Any) -> str:
    return format_bytes(num_bytes) if is_number(num_bytes) else "–"


def decimal(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def looks_like_numbers(cells: Sequence[str]) -> bool:
    """Whether a column of these is read digit under digit: every cell begins like a number or is a dash, and one is a number."""
    are_numbers = [cell.lstrip("+-")[:1].isdigit() for cell in cells]
    return any(are_numbers) and all(is_one or cell == "–" for is_one, cell in zip(are_numbers, cells, strict=True))


def _planned_and_measured(name: str, sizes: Mapping[str, Any]) -> Row:
    planned, measured = number(sizes.get("planned")), number(sizes.get("measured"))
    if planned is None or measured is None:
        return name, size(planned), size(measured), "–"
    beyond = measured - planned
    return name, size(planned), size(measured), f"{'+' if beyond > 0 else ''}{size(beyond)}"

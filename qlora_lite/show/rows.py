"""The rows that the screen and the page share: plain values in, words out.

Documents are those of a run directory (`eval.json`, `memory.json`, `merge.json`, `plan.json`); sizes in them are bytes. A missing value
or one that is not a number becomes a dash.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_lite.show.lenient import dig, is_number, mapping, mappings, number, numbers
from qlora_lite.show.text import safe_text
from qlora_lite.units import format_bytes, format_seconds

Row = tuple[str, ...]

SCORES = {
    "exact_match": ("exact match", "share of answers that match an accepted answer word for word, from 0 to 100"),
    "f1": ("F1", "overlap of the words of the answer with an accepted answer, from 0 to 100"),
    "loss": ("loss", "how unlikely the model finds the right answer; lower is better, 0 is perfect"),
}
_LEFT_OUT = {
    "too_long": "rows longer than eval.max_seq_length",
    "unusable": "unusable rows",
    "beyond_limit": "rows beyond eval.num_examples",
}
METHODS = {
    "qlora": ("QLoRA", "base in 4 bits, only an adapter is trained"),
    "lora": ("LoRA", "base in 16 bits, only an adapter is trained"),
    "full_8bit": ("full, 8-bit AdamW", "every weight is trained, with a small optimizer state"),
    "full": ("full", "every weight is trained"),
}
PARTS = {
    "weights_bytes": ("weights", "the parameters of the base model, frozen unless every weight is trained"),
    "quant_constants_bytes": ("quant constants", "the scales that convert 4-bit weights to numbers"),
    "adapter_bytes": ("adapter", "the small trained addition"),
    "gradients_bytes": ("gradients", "the direction in which each trained parameter should move"),
    "optimizer_bytes": ("optimizer", "AdamW's averages of earlier gradients"),
    "activations_bytes": ("activations", "outputs of each layer, kept for the backward pass"),
    "recompute_bytes": ("recompute", "activations of one layer, recomputed instead of kept"),
    "logits_bytes": ("logits", "a score for each token of the vocabulary, at every trained position"),
    "workspace_bytes": ("workspace", "temporary memory of single operations"),
    "runtime_bytes": ("runtime", "memory of torch and the driver"),
}
PHASES = {
    "forward": ("forward", "the model reads a text, layer by layer"),
    "head": ("head", "its predictions are compared with the answer"),
    "backward": ("backward", "gradients flow back through the layers"),
    "update": ("update", "the optimizer changes the trained parameters"),
    "evaluate": ("evaluate", "answers are generated and scored, without training"),
}
_PROOF = {
    "adapter_effect": (
        "adapter's effect",
        "the change of log-probabilities by the adapter; the unit of the rows below",
        ".4g",
    ),
    "arithmetic_ratio": (
        "arithmetic error",
        "merged in fp32 against the adapter model, relative to the effect; more than 1% is refused",
        ".3%",
    ),
    "storage_ratio": ("storage error", "added by storing in 16 bits, relative to the effect", ".3%"),
    "ratio": ("total error", "the stored model against the adapter model, relative to the effect", ".3%"),
}
_CHECKPOINTS = {
    "adapter": "adapter, for use",
    "adapter_resume": "adapter, to resume training",
    "full": "whole model in 16 bits, for use",
    "full_resume": "whole model, to resume training",
}


_ALLOCATOR = {  # key -> (name, is in bytes)
    "reserved_bytes": ("reserved by the allocator", True),
    "largest_free_bytes": ("largest free block in it", True),
    "num_retries": ("allocations retried after emptying its cache", False),
    "num_out_of_memory": ("out-of-memory errors", False),
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
    """From eval.json: a sentence about held-out rows that were not scored; [] when all were."""
    result = mapping(scores.get("after")) or mapping(scores.get("before"))
    counts = numbers(mapping(result.get("left_out")))
    reasons = [f"{counts[key]:,.0f} {reason}" for key, reason in _LEFT_OUT.items() if counts.get(key)]
    scored = number(result.get("num_examples"))
    if not reasons:
        return []
    return [f"Not scored: {', '.join(reasons)}." + (f" Scored: {scored:,.0f}." if scored is not None else "")]


def group_rows(groups: Mapping[str, Any]) -> list[Row]:
    """`score_rows` of each of `groups[name]["before" | "after"]`, the name before the label."""
    return [
        (f"{name}: {label}", *rest)
        for name, group in groups.items()
        for label, *rest in score_rows(mapping(dig(mapping(group), "before")), mapping(dig(mapping(group), "after")))
    ]


def part_rows(memory: Mapping[str, Any]) -> list[Row]:
    """Part, planned, measured and difference; parts of 0 bytes are omitted. The last row is the peak.

    The peak is not a sum of the rows: the allocator measures it, and the measured parts may be incomplete.
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
    """Memory outside the peaks: managed memory, and the statistics of the card's allocator."""
    paged, allocator = mapping(memory.get("paged_bytes")), mapping(memory.get("allocator"))
    lines: list[Row] = (
        [("optimizer state that may page to the host", size(paged["measured"]))] if paged.get("measured") else []
    )
    for key, (name, is_size) in _ALLOCATOR.items():
        if is_number(allocator.get(key)):
            lines.append((name, size(allocator[key]) if is_size else f"{allocator[key]:,}"))
    return lines


def method_rows(methods: Mapping[str, Any]) -> list[Row]:
    """One row per part, one column per method as in `method_names`; then memory that may page to the host, and the peak."""
    ordered = [mapping(methods[key]) for key in in_order(methods, METHODS)]
    parts = [mapping(method.get("parts")) for method in ordered]
    taken = dict.fromkeys(key for part in parts for key, size in part.items() if is_number(size) and size)
    rows: list[Row] = [
        (part_name(key), *(size(part.get(key) or None) for part in parts)) for key in in_order(taken, PARTS)
    ]
    hosts = [_on_host(method) for method in ordered]
    for key in dict.fromkeys(key for host in hosts for key in host):
        rows.append((_HOST_PARTS[key], *(size(host.get(key) or None) for host in hosts)))
    return [*rows, ("peak", *(size(method.get("peak_bytes")) for method in ordered))] if ordered else []


_HOST_PARTS = {
    "paged_bytes": "(may page to the host)",
    "host_layer_inputs_bytes": "(on the host: layer inputs)",
    "host_keys_values_bytes": "(on the host: keys and values)",
    "host_weights_bytes": "(on the host: weights)",
    "host_quant_constants_bytes": "(on the host: quant constants)",
}


def _on_host(method: Mapping[str, Any]) -> dict[str, float]:
    """Bytes in host memory by part; a document of an earlier version has their sum, which was paged optimizer state."""
    parts = mapping(method.get("host_parts")) or {"paged_bytes": number(method.get("host_bytes"))}
    return {key: parts[key] for key in _HOST_PARTS if is_number(parts.get(key)) and parts[key]}


def method_names(methods: Mapping[str, Any]) -> list[str]:
    return [METHODS[key][0] if key in METHODS else key for key in in_order(methods, METHODS)]


def longest_rows(methods: Mapping[str, Any]) -> list[Row]:
    """Method, the longest text in tokens that fits the budget, and the largest well-known model that fits."""
    keys = in_order(methods, METHODS)
    longest = [dig(methods, key, "max_seq_length") for key in keys]
    shown = [f"{tokens:,}" if is_number(tokens) else "none fits" for tokens in longest]
    largest = [safe_text(mapping(methods[key]).get("largest_model", "–") or "none fits") for key in keys]
    return list(zip(method_names(methods), shown, largest, strict=True))


def merge_rows(merge: Mapping[str, Any]) -> list[Row]:
    """Host memory that a merge needs."""
    steps = {"peak_host_bytes": "writing the merged checkpoint", "proof_peak_host_bytes": "proving the merge"}
    return [(name, size(merge[key])) for key, name in steps.items() if is_number(merge.get(key))]


def memory_map(grid: Any) -> tuple[list[int], list[tuple[int, list[dict[str, Any] | None]]]]:
    """-> (batches, (length, its cells in the order of the batches) for each length); None for a missing cell."""
    cells = {
        (cell["max_seq_length"], cell["batch"]): cell
        for cell in mappings(grid)
        if is_number(cell.get("max_seq_length")) and is_number(cell.get("batch"))
    }
    batches = sorted({batch for _, batch in cells})
    lengths = sorted({length for length, _ in cells})
    return batches, [(length, [cells.get((length, batch)) for batch in batches]) for length in lengths]


def checkpoint_columns(plan: Mapping[str, Any]) -> list[str]:
    """The columns of `checkpoint_rows`."""
    return ["checkpoint", "one", "ten"] + (["to write one", "to write ten"] if _disk_speed(plan) else [])


def checkpoint_rows(plan: Mapping[str, Any]) -> list[Row]:
    """Kind of checkpoint, the size of one and of ten, and the time to write them if the disk was measured; then adapters of other ranks."""
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
    """Phase, its time, its share of the total; time outside all phases is "everything else"."""
    spent = numbers(phases_s)
    whole = max(wall_s or 0.0, sum(spent.values()))
    rest = whole - sum(spent.values())
    spent |= {"everything else": rest} if rest > 0.01 * whole else {}
    rows: list[Row] = [
        (name, format_seconds(seconds), f"{100 * seconds / whole:.0f}%") for name, seconds in spent.items() if whole
    ]
    return [*rows, ("total", format_seconds(whole), "100%")] if rows else []


def phases_of(train: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase of `train.json`; without phases, of training."""
    phases_s = numbers(train.get("phases_s"))
    return phases_s or {name: s for name, s in {"training": number(train.get("train_s"))}.items() if s}


def disk_rows(disk: Sequence[tuple[str, int]]) -> list[Row]:
    """Folder and its size; the last row is the total."""
    rows: list[Row] = [(name, size(num_bytes)) for name, num_bytes in disk]
    return [*rows, ("total", size(sum(num_bytes for _, num_bytes in disk)))] if rows else []


def retries_of(memory: Mapping[str, Any]) -> list[str]:
    """The retries after running out of memory, a sentence each."""
    retries = memory.get("retries")
    return [str(retry) for retry in retries] if isinstance(retries, list) else []


def reasons_of(plan: Mapping[str, Any]) -> list[str]:
    """The reasons for the plan's settings, one line each."""
    reasons = plan.get("reasons")
    return [str(reason) for reason in reasons] if isinstance(reasons, list) else []


def concession_rows(concessions: Any) -> list[Row]:
    """Setting, bytes it saves, and the peak with it; in the order in which they were made."""
    return [
        (
            str(concession.get("setting", "–")),
            size(concession.get("saves_bytes")),
            size(concession.get("peak_bytes")),
        )
        for concession in mappings(concessions)
    ]


def savings(own_bytes: float | None, reference_bytes: float | None) -> str:
    """`2.1 GiB (81%)`: the bytes by which the own peak is below the reference; "" when one is missing or nothing is saved."""
    if not own_bytes or not reference_bytes or own_bytes >= reference_bytes:
        return ""
    saved_bytes = reference_bytes - own_bytes
    return f"{format_bytes(saved_bytes)} ({100 * saved_bytes / reference_bytes:.0f}%)"


def proof_rows(proof: Mapping[str, Any]) -> list[Row]:
    """Label, value and meaning of every field that the proof has."""
    shown: list[Row] = [
        (label, f"{proof[key]:{form}}", meaning)
        for key, (label, meaning, form) in _PROOF.items()
        if is_number(proof.get(key))
    ]
    sizes = (("peak_host_bytes", "peak memory, merge"), ("proof_peak_host_bytes", "peak memory, proof"))
    return shown + [(label, size(proof[key]), "host memory") for key, label in sizes if is_number(proof.get(key))]


def in_order(values: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The keys of `values`: known ones in the order of `known`, then the rest."""
    return [key for key in known if key in values] + [key for key in values if key not in known]


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
    """Whether to align a column of these right: every cell starts like a number or is a dash, and at least one is a number."""
    are_numbers = [cell.lstrip("+-")[:1].isdigit() for cell in cells]
    return any(are_numbers) and all(is_one or cell == "–" for is_one, cell in zip(are_numbers, cells, strict=True))


def _planned_and_measured(name: str, sizes: Mapping[str, Any]) -> Row:
    planned, measured = number(sizes.get("planned")), number(sizes.get("measured"))
    if planned is None or measured is None:
        return name, size(planned), size(measured), "–"
    beyond = measured - planned
    return name, size(planned), size(measured), f"{'+' if beyond > 0 else ''}{size(beyond)}"

"""memory.json: planned memory, measured memory, and the difference, by part and by phase.

resident     tensors that stay in memory, by their size
phases       the allocator's peaks of the largest step: forward, head, backward, update
paged        optimizer state in managed memory, on the card or the host depending on its use: not part of a peak
host         parts of the model that wait in host memory, at the peak of their sum in the largest micro-batch
allocator    final statistics of the card's caching allocator; null on the CPU
parts        at the highest of these peaks; workspace is the allocator's bytes that no tensor explains, including memory of the
                 device's libraries
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_lite.plan import Plan, as_json
from qlora_lite.runs.loading import LoadedModel
from qlora_lite.training import Preflight, TrainState, allocator_statistics, state_bytes

_RESIDENT = ("weights", "quant_constants", "adapter", "optimizer")
_MADE = ("activations", "recompute", "logits")


def memory_record(
    plan: Plan,
    loaded: LoadedModel,
    state: TrainState,
    steps: Sequence[Mapping[str, Any]],
    tried: Preflight | None,
) -> dict[str, Any]:
    """Return the content of the file at the end of training; `steps` are the lines of steps.jsonl."""
    trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    on_device, paged = state_bytes(state.optimizer)
    planned = as_json(plan.rehearsal(plan.method))
    measured = memory_of_run(
        planned,
        loaded.static_bytes | {"optimizer_bytes": on_device},
        gradients_bytes=4 * trained,
        steps=steps,
        tried=tried,
    )
    first, last = plan.chosen.footprint, state.footprint or plan.chosen.footprint
    return {
        "method": plan.method,
        "budget_bytes": plan.budget_bytes,
        **measured,
        "paged_bytes": compared(planned["host_parts"].get("paged_bytes", 0), paged),
        "host": _on_host(planned["host_parts"], tried),
        "allocator": allocator_statistics(plan.device),
        "retries": [] if last == first else [f"out of memory with {first}; trained with {last}"],
    }


def memory_of_run(
    planned: Mapping[str, Any],
    resident: Mapping[str, int],
    *,
    gradients_bytes: int,
    steps: Sequence[Mapping[str, Any]],
    tried: Preflight | None,
) -> dict[str, Any]:
    """`planned` is one of a plan's `methods`; `resident` has the sizes of _RESIDENT; `steps` are the lines of steps.jsonl."""
    phases = _measured_phases(sum(resident.values()), steps)
    peak = max(phases.values(), default=None)
    parts = _measured_parts(resident, gradients_bytes, phases, tried)
    return {
        "peak_bytes": {"planned": planned["peak_bytes"], "measured": peak},
        "rss_bytes": max((step["rss_bytes"] for step in steps), default=0),
        "parts": {
            part: compared(size, parts.get(part.removesuffix("_bytes"))) for part, size in planned["parts"].items()
        },
        "phases": {
            phase: compared(entry["peak_bytes"], phases.get(phase)) for phase, entry in planned["phases"].items()
        },
        "timeline": [
            {"phase": m.phase, "layer": m.name, "bytes": m.num_bytes} for m in (tried.moments if tried else ())
        ],
    }


def _on_host(planned: Mapping[str, int], tried: Preflight | None) -> dict[str, dict[str, int | None]]:
    measured = tried.on_host if tried is not None else {}
    parts = [part for part in planned if part != "paged_bytes"]
    return {part: compared(planned[part], measured.get(part.removesuffix("_bytes"))) for part in parts}


def compared(planned: int, measured: int | None) -> dict[str, int | None]:
    """Return one entry of the file; without a measurement, the difference is null."""
    return {"planned": planned, "measured": measured, "difference": None if measured is None else measured - planned}


def _measured_phases(resident: int, steps: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the highest measured peak by phase, over all sessions of the run."""
    peaks: dict[str, int] = {}
    for step in steps:
        for phase, peak in (step.get("phase_peaks") or {}).items():
            peaks[phase] = max(peaks.get(phase, 0), resident + peak)
    return peaks


def _measured_parts(
    resident: Mapping[str, int], gradients_bytes: int, phases: Mapping[str, int], tried: Preflight | None
) -> dict[str, int]:
    if not phases:
        return {}
    phase = max(phases, key=lambda name: phases[name])
    made = tried.phases.get(phase, {}) if tried is not None else {}
    parts = {name: resident[f"{name}_bytes"] for name in _RESIDENT}
    parts["gradients"] = made.get("gradients", 0) if made else gradients_bytes  # all gradients exist before an update
    parts |= {name: made.get(name, 0) for name in _MADE}
    return parts | {"workspace": phases[phase] - sum(parts.values()), "runtime": 0}

"""The memory report of a model that nobody has loaded: what it needs by every method, what fits a budget, what it weighs on disk.

In: a config and `Settings`. Out: `Forecast`. `sweep` asks the same of many models and many cards at once.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from qlora_lite.plan.compare import METHODS, Comparison, as_json
from qlora_lite.plan.fits import Cell, Growth, Room, is_straight, longest_length, memory_map
from qlora_lite.plan.rehearsal import MicroBatch, Rehearsal, Settings
from qlora_lite.units import format_bytes

CARDS = tuple(gib * 2**30 for gib in (8, 12, 16, 24, 48, 80))  # bytes: the sizes that cards are sold in


@dataclass(frozen=True)
class Forecast:
    """What `plan` says. `methods` are rehearsed on the same micro-batch; `longest` is each method's longest sequence in the budget."""

    method: str  # one of METHODS: the one that would be run
    methods: dict[str, Rehearsal]
    longest: dict[str, int | None]
    grid: tuple[Cell, ...]
    checkpoint_bytes: dict[str, int]
    budget_bytes: int

    @property
    def own(self) -> Rehearsal:
        return self.methods[self.method]

    @property
    def fits(self) -> bool:
        return self.own.peak_bytes <= self.budget_bytes

    def to_json_dict(self) -> dict[str, Any]:
        full = self.methods["full"].peak_bytes
        return {
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "num_weights": self.methods["full"].num_weights,
            "num_trained": self.own.num_trained,
            "methods": {
                name: as_json(found) | {"max_seq_length": self.longest[name]} for name, found in self.methods.items()
            },
            "savings_vs_full": {
                "bytes": full - self.own.peak_bytes,
                "percent": 100 * (1 - self.own.peak_bytes / full),
            },
            "max_seq_length": self.longest[self.method],
            "checkpoint_bytes": self.checkpoint_bytes,
            "grid": [vars(cell) for cell in self.grid],
        }

    def shortage(self) -> str:
        """Why it does not fit and what to try: for people, when `fits` is false."""
        parts = self.own.parts
        largest = max(parts, key=lambda part: parts[part])
        smallest = min(self.grid, key=lambda cell: cell.peak_bytes)
        return (
            f"does not fit: needs {format_bytes(self.own.peak_bytes)} of {format_bytes(self.budget_bytes)}. Largest part: "
            f"{largest.replace('_', ' ')} {format_bytes(parts[largest])}. One example of {smallest.max_seq_length} tokens needs "
            f"{format_bytes(smallest.peak_bytes)}"
        )


def forecast(config: PreTrainedConfig, settings: Settings, batch: MicroBatch, room: Room, *, method: str) -> Forecast:
    """`method` is the one of METHODS that would be run. Raises ModelError for a config that is no model."""
    comparison = Comparison(config, settings)
    growth = {name: _growth(comparison, name, config, room.label_share) for name in METHODS}
    return Forecast(
        method=method,
        methods={name: comparison.rehearse(name, batch) for name in METHODS},
        longest={name: longest_length(growth[name], room) for name in METHODS},
        grid=memory_map(growth[method], room),
        checkpoint_bytes=comparison.checkpoint_bytes(batch),
        budget_bytes=room.budget_bytes,
    )


def sweep(
    models: Iterable[tuple[str, PreTrainedConfig, int | None]], settings: Settings, *, label_share: float
) -> Iterator[dict[str, Any]]:
    """For each (name, config, positions): its weights, QLoRA's peak for 1,024 tokens, and the longest sequence on each of CARDS."""
    for name, config, positions in models:
        comparison = Comparison(config, replace(settings, method="qlora"))
        growth = _growth(comparison, "qlora", config, label_share)
        found = comparison.rehearse("qlora", MicroBatch(1024, 1, label_share))
        longest = {card: longest_length(growth, Room(card, positions, label_share)) for card in CARDS}
        yield {
            "model": name,
            "num_weights": found.num_weights,
            "peak_bytes": found.peak_bytes,
            "max_seq_length": {str(card): length for card, length in longest.items()},
        }


def _growth(comparison: Comparison, method: str, config: PreTrainedConfig, label_share: float) -> Growth:
    return Growth(partial(comparison.rehearse, method), label_share=label_share, is_straight=is_straight(config))

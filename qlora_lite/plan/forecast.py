"""The memory report of a model without its weights: memory by every method, sizes that fit a budget, sizes on disk.

In: a config and `Settings`. Out: `Forecast`. `sweep` does the same for many models and cards at once.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from qlora_lite.base.skeleton import model_class
from qlora_lite.merging.proof import PROOF_TOKENS
from qlora_lite.model.attention import packs_rows
from qlora_lite.model.policy import Policy
from qlora_lite.plan.compare import METHODS, Comparison, Rehearsals, as_json
from qlora_lite.plan.fits import STEP, Cell, Growth, Labels, Room, longest_length, memory_map, totals
from qlora_lite.plan.homes import Budgets, length_about
from qlora_lite.plan.largest import largest_model
from qlora_lite.plan.merging import Merging, merge_peak_host_bytes, proof_peak_host_bytes
from qlora_lite.plan.planner import Concession, Fit, concessions, shortage
from qlora_lite.plan.rehearsal import MicroBatch, Rehearsal, Settings, num_labels

_CHUNK = 4096  # tokens: smaller ones fit longer sequences, and take longer to rehearse
CARDS = tuple(gib * 2**30 for gib in (8, 12, 16, 24, 48, 80))  # bytes: the sizes of cards on the market


@dataclass(frozen=True)
class Forecast:
    """The report of `plan`. `methods` are rehearsed with the same settings; `longest` is each method's longest sequence in the budget.

    `longest` and `grid` use the leanest settings that the planner may choose.
    """

    method: str  # the one of METHODS that would run
    methods: dict[str, Rehearsal]
    longest: dict[str, int | None]
    largest: dict[str, str | None]  # each method's largest well-known model in the budget
    merge: dict[str, int] | None  # host memory of merging and of its proof; None if nothing is merged
    grid: tuple[Cell, ...]
    checkpoint_bytes: dict[str, int]
    adapter_bytes: dict[int, int]  # of an adapter on disk, by rank
    budgets: Budgets
    slowdown: float
    further: tuple[Concession, ...]  # if it does not fit

    @property
    def own(self) -> Rehearsal:
        return self.methods[self.method]

    @property
    def fits(self) -> bool:
        return self.budgets.fit(self.own)

    @property
    def budget_bytes(self) -> int:
        return self.budgets.device

    def to_json_dict(self) -> dict[str, Any]:
        full = self.methods["full"].peak_bytes
        return {
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "slowdown": self.slowdown,
            "smallest_budget_bytes": None if self.fits else self.own.peak_bytes,
            "concessions": [vars(concession) for concession in self.further],
            "num_weights": self.methods["full"].num_weights,
            "num_trained": self.own.num_trained,
            "methods": {
                name: as_json(rehearsal) | {"max_seq_length": self.longest[name], "largest_model": self.largest[name]}
                for name, rehearsal in self.methods.items()
            },
            "savings_vs_full": {
                "bytes": full - self.own.peak_bytes,
                "percent": 100 * (1 - self.own.peak_bytes / full),
            },
            "max_seq_length": self.longest[self.method],
            "checkpoint_bytes": self.checkpoint_bytes,
            "adapter_bytes": {str(r): size for r, size in self.adapter_bytes.items()},
            "merge": self.merge,
            "grid": [vars(cell) for cell in self.grid],
        }

    def shortage(self) -> str:
        """Return a message for users: the shortage and settings to try, when `fits` is false."""
        return shortage(self.own, self.further, self.budgets)


@dataclass(frozen=True)
class SweptModel:
    """One model of `sweep`."""

    model: str
    num_weights: int
    peak_bytes: int  # of QLoRA, for 1,024 tokens
    max_seq_length: dict[int, int | None]  # by bytes of the card, in an ordinary step; None if nothing fits
    max_seq_length_with_homes: dict[int, int | None]  # with layers in chunks, and parts of the model in host memory

    def to_json_dict(self) -> dict[str, Any]:
        def by_card(longest: dict[int, int | None]) -> dict[str, int | None]:
            return {str(card): length for card, length in longest.items()}

        return vars(self) | {
            "max_seq_length": by_card(self.max_seq_length),
            "max_seq_length_with_homes": by_card(self.max_seq_length_with_homes),
        }


def forecast(
    rehearsals: Rehearsals, chosen: Fit, leanest: Settings, room: Room, *, method: str, host_budget_bytes: int = 0,
    merging: Merging | None = None,
) -> Forecast:  # fmt: skip
    """Make the report; `method` is the one of METHODS that would run. Raises ModelError for an invalid config."""
    comparison, batch = Comparison(rehearsals, chosen.settings), chosen.batch
    growth = growth_by_method(Comparison(rehearsals, leanest), rehearsals.config, batch, room.label_share)
    methods = {name: comparison.rehearse(name, batch, chosen.scoring if name == method else None) for name in METHODS}
    budgets = Budgets(room.budget_bytes, host_budget_bytes, chosen.settings.card.is_cpu)
    fits = budgets.fit(methods[method])
    return Forecast(
        method=method,
        methods=methods,
        longest={
            name: None
            if _resident_bytes(name, methods[name]) > room.budget_bytes
            else longest_length(growth[name], room)
            for name in METHODS
        },
        largest={
            name: largest_model(name, leanest, budget_bytes=room.budget_bytes, label_share=room.label_share)
            for name in METHODS
        },
        merge=None if merging is None else _merge(rehearsals.config, merging, batch),
        grid=memory_map(growth[method], room),
        checkpoint_bytes=comparison.checkpoint_bytes(batch),
        adapter_bytes=comparison.adapter_bytes(batch),
        budgets=budgets,
        slowdown=chosen.slowdown,
        further=() if fits else concessions(rehearsals, chosen.settings, batch, chosen.scoring),
    )


def _resident_bytes(method: str, rehearsal: Rehearsal) -> int:
    """Return the minimum bytes of any step of the method: above the budget, no length needs a rehearsal."""
    parts = ("weights", "quant_constants", "adapter", *(["optimizer"] if method.startswith("full") else []))
    return sum(rehearsal.parts.get(part, 0) for part in parts)


def sweep(
    models: Iterable[tuple[str, PreTrainedConfig, int | None]],
    settings: Settings,
    *,
    label_share: float,
    host_budget_bytes: int,
) -> Iterator[SweptModel]:
    """For each (name, config, positions): its weights, QLoRA's peak for 1,024 tokens, and the longest sequence on each of CARDS, in an
    ordinary step and with layers in chunks."""
    settings = replace(settings, method="qlora")
    for name, config, positions in models:
        rehearsals = Rehearsals(config)
        comparison = Comparison(rehearsals, settings)
        growth = growth_by_method(comparison, config, MicroBatch(1024, 1, label_share), label_share)["qlora"]
        longest = {card: longest_length(growth, Room(card, positions, label_share)) for card in CARDS}
        with_homes = _longest_with_homes(rehearsals, settings, label_share, host_budget_bytes, positions)
        yield SweptModel(name, growth.num_weights, growth.peak_bytes(1024), longest, with_homes)


def _longest_with_homes(
    rehearsals: Rehearsals, settings: Settings, label_share: float, host_budget_bytes: int, positions: int | None
) -> dict[int, int | None]:
    """The longest sequence on each of CARDS with layers in chunks: everything on the device, or most of it on the host."""
    if not packs_rows(model_class(rehearsals.config)):
        return dict.fromkeys(CARDS)
    policies = (Policy(_CHUNK, "fewest"), Policy(_CHUNK, "host_fewest", 0, embeddings="host", head="streamed"))
    longest: dict[int, int | None] = {}
    for card in CARDS:
        lengths = [
            length_about(
                partial(rehearsals.of, replace(settings, policy=policy)),
                policy,
                label_share,
                Budgets(card, host_budget_bytes),
            )
            for policy in policies
        ]
        longest[card] = min(max(lengths), positions or max(lengths)) // STEP * STEP or None
    return longest


def _merge(config: PreTrainedConfig, merging: Merging, batch: MicroBatch) -> dict[str, int]:
    """Return host bytes of a merge and of its proof on PROOF_TOKENS tokens in examples of the longest length."""
    rows = [(batch.length, num_labels(batch))] * max(1, PROOF_TOKENS // batch.length)
    return {
        "peak_host_bytes": merge_peak_host_bytes(config, merging),
        "proof_peak_host_bytes": proof_peak_host_bytes(config, merging, rows),
    }


def growth_by_method(
    comparison: Comparison, config: PreTrainedConfig, batch: MicroBatch, label_share: float
) -> dict[str, Growth]:
    """Return the growth of every method. QLoRA and LoRA have the same frozen head, so they share `Labels`. Full fine-tuning with 8-bit
    states differs from full fine-tuning by its states only: their difference at `batch` applies to any micro-batch."""

    def growth(method: str, labels: Labels) -> Growth:
        return Growth(partial(comparison.rehearse, method), config, labels, label_share=label_share)

    def in_8_bits() -> dict[str, float]:
        in_8bit, in_32bit = (totals(comparison.rehearse(method, batch)) for method in ("full_8bit", "full"))
        return {stretch: in_8bit[stretch] - in_32bit[stretch] for stretch in in_8bit}

    of_frozen, of_trained = (
        Labels(partial(comparison.rehearse, method), chunk=comparison.settings.head_chunk)
        for method in ("qlora", "full")
    )
    full = growth("full", of_trained)
    return {
        "qlora": growth("qlora", of_frozen),
        "lora": growth("lora", of_frozen),
        "full": full,
        "full_8bit": full.raised(in_8_bits),
    }

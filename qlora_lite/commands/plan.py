"""The verb `plan`: memory that training needs by every method, and sizes that fit; `--sweep`: every known model; `--cards`: known cards."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_lite import show
from qlora_lite.base.known import KNOWN, known_config
from qlora_lite.base.source import context_window
from qlora_lite.device.card import Card, card_in_table, card_named, name_of
from qlora_lite.device.known_cards import KNOWN_CARDS
from qlora_lite.errors import UserError
from qlora_lite.files.cache import default_cache
from qlora_lite.memory.kept import disk_speed
from qlora_lite.plan import Forecast, Resolved, SweptModel, forecast, plan_of_model, read_request, sweep
from qlora_lite.units import parse_budget


@dataclass(frozen=True)
class Planned:
    """The plan of a model or a recipe."""

    model: str  # as asked for
    resolved: Resolved
    report: Forecast
    disk_speed: dict[str, float | None]  # of the cache's disk, as measured by doctor

    @property
    def fits(self) -> bool:
        return self.report.fits

    def to_json_dict(self) -> dict[str, Any]:
        resolved = self.resolved
        return {
            "model": self.model,
            "card": name_of(resolved.card),
            "settings": resolved.recipe.model_dump(mode="json"),
            "reasons": list(map(str, resolved.reasons)),
            "sharing": resolved.sharing and resolved.sharing.to_json_dict(),
            **self.report.to_json_dict(),
            **self.disk_speed,
        }


@dataclass(frozen=True)
class Swept:
    """Every known model on every usual card."""

    resolved: Resolved
    models: tuple[SweptModel, ...]

    def to_json_dict(self) -> dict[str, Any]:
        settings = self.resolved.recipe.model_dump(mode="json")
        models = [model.to_json_dict() for model in self.models]
        return {"settings": settings, "reasons": list(map(str, self.resolved.reasons)), "models": models}


@dataclass(frozen=True)
class CardRow:
    """One row of `plan --cards`."""

    name: str
    full_name: str
    memory_bytes: int
    compute_capability: str
    dtype: str
    attention: str
    operations_per_s: float
    memory_bytes_per_s: float
    power_w: float


@dataclass(frozen=True)
class Cards:
    """The cards that `plan --card` knows."""

    cards: tuple[CardRow, ...]

    def to_json_dict(self) -> dict[str, Any]:
        return {"cards": [asdict(card) for card in self.cards]}


def plan(
    what: str, overrides: Sequence[str], *, budget: str | None, card: str | None = None, html: Path | None = None
) -> Planned:
    """Plan a model or a recipe: memory by every method, and sizes that fit; also written as a page to `html`."""
    named, budget_bytes = None if card is None else card_named(card), _budget(budget)
    with show.phase(f"rehearsing {what} on the meta device"):
        planned = read_request(what, overrides=overrides, budget_bytes=budget_bytes, named=named)
        report = forecast(
            planned.rehearsals,
            planned.chosen,
            planned.leanest,
            planned.room,
            method=planned.method,
            host_budget_bytes=planned.host_budget_bytes,
            merging=planned.merging,
        )
    result = Planned(what, planned, report, disk_speed(default_cache()))
    document = result.to_json_dict()
    show.show_plan(document)
    if html is not None:
        decisions = [(reason.key, reason.decision) for reason in planned.reasons]
        show.say(f"page: {show.write_plan_page(document, html, decisions=decisions)}")
    if not report.fits:
        show.say_warning(report.shortage())
    return result


def sweep_models(overrides: Sequence[str]) -> Swept:
    """The longest sequence that QLoRA can train on each usual card, for every model of the built-in table."""
    planned = plan_of_model(KNOWN[0], overrides)
    rows: list[SweptModel] = []
    with show.phase("rehearsing every known model") as phase:
        models = ((name, config, context_window(config)) for name in KNOWN for config in [known_config(name)])
        for row in sweep(
            models,
            planned.leanest,
            label_share=planned.label_share,
            host_budget_bytes=planned.host_budget_bytes,
        ):
            rows.append(row)
            phase.progress(len(rows), len(KNOWN))
    show.show_reasons(list(map(str, planned.reasons)))
    show.show_sweep([row.to_json_dict() for row in rows])
    return Swept(planned, tuple(rows))


def cards() -> Cards:
    """The cards that `plan --card` knows."""
    known = Cards(tuple(card_row(name, card_in_table(name)) for name in KNOWN_CARDS))
    show.show_cards([asdict(card) for card in known.cards])
    return known


def card_row(name: str, card: Card) -> CardRow:
    """One row of `plan --cards`."""
    assert card.capability is not None
    return CardRow(
        name=name,
        full_name=card.name,
        memory_bytes=card.memory_bytes,
        compute_capability="{}.{}".format(*card.capability),
        dtype="bf16" if card.has_bf16 else "fp16",
        attention=card.attention_kernel(torch.bfloat16 if card.has_bf16 else torch.float16, 128),
        operations_per_s=card.flops,
        memory_bytes_per_s=card.bytes_per_s,
        power_w=card.power_w,
    )


def _budget(text: str | None) -> int | None:
    try:
        num_bytes = None if text is None else parse_budget(text)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from error
    if num_bytes == 0:
        raise UserError(f"--budget: expected a size above 0, such as 24GiB, got {text}; leave it out for the default")
    return num_bytes

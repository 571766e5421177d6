"""The verb `plan`: memory that training needs by every method, and sizes that fit; `--sweep`: every known model; `--cards`: known cards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_lite import show
from qlora_lite.base.known import KNOWN, known_config
from qlora_lite.base.shipped import default_cache
from qlora_lite.base.source import context_window
from qlora_lite.device.card import Card, card_in_table, card_named, name_of
from qlora_lite.device.known_cards import KNOWN_CARDS
from qlora_lite.errors import UserError
from qlora_lite.memory.kept import disk_speed
from qlora_lite.plan import forecast, plan_of_model, read_request, sweep
from qlora_lite.units import parse_budget


def plan(
    what: str, overrides: Sequence[str], *, budget: str | None, card: str | None = None, html: Path | None = None
) -> dict[str, Any]:
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
            merging=planned.merging,
        )
    document = {
        "model": what,
        "card": name_of(planned.card),
        "settings": planned.recipe.model_dump(mode="json"),
        "reasons": list(map(str, planned.reasons)),
        "sharing": planned.sharing and planned.sharing.to_json_dict(),
        **report.to_json_dict(),
        **disk_speed(default_cache()),
    }
    show.show_plan(document)
    if html is not None:
        decisions = [(reason.key, reason.decision) for reason in planned.reasons]
        show.say(f"page: {show.write_plan_page(document, html, decisions=decisions)}")
    if not report.fits:
        show.say_warning(report.shortage())
    return document


def sweep_models(overrides: Sequence[str]) -> dict[str, Any]:
    """The longest sequence that QLoRA can train on each usual card, for every model of the built-in table."""
    planned = plan_of_model(KNOWN[0], overrides)
    rows: list[dict[str, Any]] = []
    with show.phase("rehearsing every known model") as phase:
        models = ((name, config, context_window(config)) for name in KNOWN for config in [known_config(name)])
        for row in sweep(models, planned.leanest, label_share=planned.label_share):
            rows.append(row)
            phase.progress(len(rows), len(KNOWN))
    reasons = list(map(str, planned.reasons))
    show.show_reasons(reasons)
    show.show_sweep(rows)
    settings = planned.recipe.model_dump(mode="json")
    return {"settings": settings, "reasons": reasons, "models": rows}


def cards() -> dict[str, Any]:
    """The cards that `plan --card` knows."""
    rows = [card_row(name, card_in_table(name)) for name in KNOWN_CARDS]
    show.show_cards(rows)
    return {"cards": rows}


def card_row(name: str, card: Card) -> dict[str, Any]:
    """One row of `plan --cards`."""
    assert card.capability is not None
    return {
        "name": name,
        "full_name": card.name,
        "memory_bytes": card.memory_bytes,
        "compute_capability": "{}.{}".format(*card.capability),
        "dtype": "bf16" if card.has_bf16 else "fp16",
        "attention": card.attention_kernel(torch.bfloat16 if card.has_bf16 else torch.float16, 128),
        "operations_per_s": card.flops,
        "memory_bytes_per_s": card.bytes_per_s,
        "power_w": card.power_w,
    }


def _budget(text: str | None) -> int | None:
    try:
        num_bytes = None if text is None else parse_budget(text)
    except ValueError as error:
        raise UserError(f"--budget: {error}") from error
    if num_bytes == 0:
        raise UserError(f"--budget: expected a size above 0, such as 24GiB, got {text}; leave it out for the default")
    return num_bytes

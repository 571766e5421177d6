"""The plan knows every key of a recipe that costs memory: each key is in the rehearsal, or on a list with its reason."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from qlora_lite.device.card import COMMON_CARD
from qlora_lite.device.card import CPU as CPU_CARD
from qlora_lite.memory.measuring import measure_allocations
from qlora_lite.model.adapter import Lora, attach_adapter
from qlora_lite.model.forward import causal_lm
from qlora_lite.model.load import checkpoint_activations, load_base
from qlora_lite.model.new_tokens import make_room
from qlora_lite.plan import MicroBatch, Resolved, Settings, make_plan
from qlora_lite.plan.rehearsal import Scene
from qlora_lite.recipe import Recipe, load_recipe
from qlora_lite.recipe.schema import Section
from tests.promises.test_promise_06_plan import first_step, real_ledger, real_step
from tests.tiny_model import SIZES, tiny_artefact
from tests.tiny_run import write_recipe

CPU = Settings(card=CPU_CARD, r=4, optimizer="adamw", num_threads=torch.get_num_threads())

# Each key that costs memory, with a value that must change what is rehearsed.
REHEARSED: dict[str, Any] = {
    "method": "full",
    "model.quantization": "int8",
    "model.double_quant": False,
    "model.dtype": "fp32",
    "lora.r": 32,
    "lora.lora_dropout": 0.1,
    "lora.target_modules": ["q_proj"],
    "lora.use_dora": True,
    "lora.modules_to_save": ["lm_head"],
    "data.max_seq_length": 200,
    "data.special_tokens": ["<|new|>"],
    "data.share_prefixes": True,
    "data.num_train": 5,
    "train.micro_batch_tokens": 33,
    "train.examples_per_step": 1,
    "train.optimizer": "adamw",
    "memory.gradient_checkpointing": 2,
    "memory.head_chunk": 16,
    "memory.eval_batch_tokens": 64,
    "memory.chunk_tokens": 16,
    "memory.layer_inputs": "fewest",
    "memory.resident_layers": 1,
    "memory.embeddings": "host",
    "memory.head": "streamed",
    "memory.keys_values": "host",
    "eval.num_examples": 1,
    "eval.max_new_tokens": 7,
    "eval.max_seq_length": 150,
    "merge.dtype": "fp32",
    "merge.rounding": "nearest",
}
NOT_REHEARSED = {
    "model.base": "the config that is rehearsed",
    "model.revision": "which model.base is meant",
    "model.attention": "only sdpa is carried out",
    "lora.lora_alpha": "a factor",
    "lora.use_rslora": "a factor",
    "lora.init_from": "values of the same factors",
    "data.train": "its rows are what `Needs` looks at",
    "data.eval": "its rows are what `Needs` looks at",
    "data.format": "how rows are read",
    "data.no_answer_text": "text of rows",
    "train.epochs": "how many steps, each within the same micro-batch",
    "train.max_steps": "how many steps, each within the same micro-batch",
    "train.learning_rate": "a factor",
    "train.schedule": "a factor",
    "train.warmup_ratio": "a factor",
    "train.weight_decay": "a factor",
    "train.max_grad_norm": "a factor",
    "train.loraplus_ratio": "a factor",
    "train.eval_every_steps": "validation is rehearsed with evaluation, whenever it runs",
    "train.save_every_steps": "files",
    "train.keep_checkpoints": "files",
    "train.early_stop": "how many steps",
    "train.trackers": "files",
    "train.seed": "the order of the rows: the largest micro-batch is as full as one may be",
    "memory.budget": "what the peak is held against",
    "memory.host_budget": "what parts on the host are held against",
    "memory.stream_from": "where streamed weights lie; rehearsed with memory.resident_layers (tests/plan/test_residency.py)",
    "merge.base": "which files are read, one tensor at a time",
    "merge.scale": "a factor",
    "merge.proof": "planned for the rows that a proof takes when left to auto",
    "device": "the card that is rehearsed for",
}


def keys_of(section: type[Section], prefix: str = "") -> list[str]:
    """Every key of a recipe, with its section."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, Section)
        keys += keys_of(inner, f"{name}.") if is_section else [prefix + name]
    return keys


def test_every_key_is_rehearsed_or_has_a_reason_why_not() -> None:
    assert sorted([*REHEARSED, *NOT_REHEARSED]) == sorted(keys_of(Recipe))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def unchanged(recipe: Path) -> Iterator[tuple[Any, ...]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_LITE_HOME", str(recipe.parent / "home"))
        yield rehearsed(recipe)


def rehearsed(recipe: Path, *overrides: str) -> tuple[Any, ...]:
    plan: Resolved = make_plan(load_recipe(recipe, overrides=overrides))
    return plan.method, plan.chosen.settings, plan.batch, plan.chosen.scoring, plan.merging


@pytest.mark.parametrize("key", [key for key in REHEARSED if key != "data.share_prefixes"])
def test_a_key_that_costs_memory_changes_what_is_rehearsed(key: str, recipe: Path, unchanged: tuple[Any, ...]) -> None:
    value = REHEARSED[key]
    text = (
        "[" + ", ".join(value) + "]"
        if isinstance(value, list)
        else str(value).lower()
        if isinstance(value, bool)
        else value
    )
    assert rehearsed(recipe, f"{key}={text}") != unchanged, key


def test_sharing_changes_what_is_rehearsed(tmp_path: Path) -> None:
    recipe, path = write_recipe(tmp_path), tmp_path / "train.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    passage = document["data"][0]["paragraphs"][0]
    qas = [{**passage["qas"][0], "id": f"q{i}", "question": f"{i}. Where is it?"} for i in range(8)]
    document["data"][0]["paragraphs"] = [{**passage, "qas": qas}]
    path.write_text(json.dumps(document), encoding="utf-8")
    trunks = [
        make_plan(load_recipe(recipe, overrides=[f"data.share_prefixes={word}"])).batch.trunk
        for word in ("true", "false")
    ]
    assert trunks[0] > 0 == trunks[1]


VOCABULARY = 300  # of the tiny model: its rows
KEYS = {
    "dropout": replace(CPU, lora_dropout=0.05),
    "rows that the base has": replace(CPU, token_ids=(7, 9)),
    "rows beyond those of the base": replace(CPU, token_ids=(VOCABULARY, VOCABULARY + 1)),
    "both": replace(CPU, lora_dropout=0.05, token_ids=(VOCABULARY + 2,)),
}


def real_model(settings: Settings):
    base = load_base(tiny_artefact(), device="cpu", compute=settings.compute).model
    new = make_room(base, settings.token_ids) if settings.token_ids else ()
    model = attach_adapter(
        base,
        Lora(r=settings.r, lora_alpha=2 * settings.r, lora_dropout=settings.lora_dropout),
        new_token_ids=new,
        factor_dtype=settings.factors,
    )
    checkpoint_activations(base, every=settings.checkpoint_every)
    return model


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("name", KEYS)
def test_the_planned_peak_with_dropout_and_new_tokens_meets_the_allocators(name: str, every: int) -> None:
    settings, micro_batch = replace(KEYS[name], checkpoint_every=every), MicroBatch(400, 4, 0.1, is_first=True)
    model = real_model(settings)
    scene = Scene(load_base(tiny_artefact(), device="cpu").model.config, settings)
    planned = scene.rehearse(micro_batch)
    assert scene.peak_totals == pytest.approx(real_ledger(model, settings, micro_batch), rel=0.005)
    step, optimizer, _ = real_step(model, settings, micro_batch)
    first_step(model, optimizer)
    with measure_allocations("cpu") as allocations:
        step()
    resident = sum(
        planned.phases["forward"].get(part, 0) for part in ("weights", "quant_constants", "adapter", "optimizer")
    )
    assert resident + allocations.peak_bytes == pytest.approx(planned.peak_bytes, rel=0.01)
    assert planned.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    bare = Scene(causal_lm(model).config, replace(settings, lora_dropout=0.0, token_ids=())).rehearse(micro_batch)
    assert planned.peak_bytes > bare.peak_bytes or every == 1


def test_a_card_keeps_a_mask_of_booleans_and_the_cpu_one_of_numbers() -> None:
    config, batch = LlamaConfig(vocab_size=300, **SIZES), MicroBatch(400, 4, 0.1)
    grown = {}
    for card in (CPU_CARD, COMMON_CARD):
        with_it, without = (
            Scene(config, replace(CPU, card=card, lora_dropout=p, checkpoint_every=0)).rehearse(batch).peak_bytes
            for p in (0.05, 0.0)
        )
        grown[card] = with_it - without
    assert 0 < grown[COMMON_CARD] < grown[CPU_CARD]

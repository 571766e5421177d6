"""Methods qlora, lora and full through the same loop, checkpoints, evaluation and files; where a merge lands."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_lite import evaluate, load_model, load_recipe, make_plan, merge, train
from qlora_lite.api import open_run, run_models
from qlora_lite.base.bnb import dequantized
from qlora_lite.errors import RunError
from qlora_lite.model.frozen_int8 import FrozenInt8
from qlora_lite.runs.loading import base_folder
from tests.tiny_run import write_recipe

METHODS = ("qlora", "lora", "full")


def overrides(*more: str) -> list[str]:
    return ["train.max_steps=6", "train.learning_rate=5e-3", "train.optimizer=adamw", *more]


def trained_run(recipe: Path, run_dir: Path, *settings: str):
    plan = make_plan(load_recipe(recipe, overrides=overrides(*settings)))
    loaded = load_model(plan)
    losses = [stats.loss for stats in train(plan, loaded, run_dir)]
    return plan, loaded, losses


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_its_files_hold_what_it_has_learned(recipe, tmp_path, method):
    plan, loaded, losses = trained_run(recipe, tmp_path / "run", f"method={method}")
    assert losses[-1] < losses[0]
    tuned = evaluate(plan, loaded)
    run, again = open_run(tmp_path / "run")
    assert again.recipe.method == method
    (read,) = run_models(again, run, ["adapter"])
    assert evaluate(again, read).loss == pytest.approx(tuned.loss, abs=1e-4)
    for base in run_models(again, run, ["base"]):
        assert evaluate(again, base).loss > tuned.loss
    assert json.loads((tmp_path / "run" / "env.json").read_text())["base_sha256"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_continued_ends_where_one_without_a_break_does(recipe, tmp_path, method):
    _, whole, _ = trained_run(recipe, tmp_path / "whole", f"method={method}")
    settings = overrides(f"method={method}", "train.save_every_steps=3")
    plan = make_plan(load_recipe(recipe, overrides=settings))
    steps = train(plan, load_model(plan), tmp_path / "parts", should_stop=lambda: True)
    assert [stats.step for stats in steps] == [1]
    continued = load_model(plan)
    list(train(plan, continued, tmp_path / "parts", resume=True))
    ours, theirs = (dict(one.model.named_parameters()) for one in (continued, whole))
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.items())


def test_full_training_writes_weights_that_transformers_reads_and_has_nothing_to_merge(recipe, tmp_path):
    plan, loaded, _ = trained_run(recipe, tmp_path / "run", "method=full", "model.dtype=bf16")
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "run" / "weights"), dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(theirs[name], p) for name, p in loaded.model.named_parameters())
    assert not (tmp_path / "run" / "adapter").exists()
    before = AutoModelForCausalLM.from_pretrained(str(plan.source), dtype=torch.bfloat16).state_dict()
    assert all(not torch.equal(theirs[name], before[name]) for name, p in loaded.model.named_parameters())
    with pytest.raises(RunError, match="nothing to merge"):
        merge(plan, tmp_path / "run")


def test_full_training_follows_the_fp32_master(recipe, tmp_path):
    """One step on the bf16 weights is one step of AdamW on fp32 copies of them, rounded."""
    plan = make_plan(
        load_recipe(
            recipe,
            overrides=overrides("method=full", "model.dtype=bf16", "train.max_steps=1", "train.warmup_ratio=0"),
        )
    )
    loaded = load_model(plan)
    start = {name: p.detach().float().clone() for name, p in loaded.model.named_parameters()}
    list(train(plan, loaded, tmp_path / "run"))
    state = load_file(next((tmp_path / "run" / "checkpoints").iterdir()) / "state.safetensors")
    for name, parameter in loaded.model.named_parameters():
        assert f"optimizer/{name}/low_bits" in state
        moved = (parameter.detach().float() - start[name]).abs()
        assert moved.max() <= 5e-3 + parameter.abs().max() * 2**-8  # AdamW's first step is at most the learning rate


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_a_merge_lands_on_the_base_that_was_asked_for_and_is_proved_there(recipe, tmp_path, base):
    plan, _, _ = trained_run(recipe, tmp_path / "run", f"merge.base={base}", "merge.dtype=fp32")
    result = merge(plan, tmp_path / "run")
    assert result.adapter_effect > 0 and result.arithmetic_ratio < 0.01
    merged = load_file(result.out / "model.safetensors")
    original = load_file(plan.source / "model.safetensors")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    change = plan.recipe.lora.lora_alpha / plan.recipe.lora.r * b @ a
    distance = (merged[f"{name}.weight"] - change - original[f"{name}.weight"].float()).norm()
    assert (distance < 1e-4) == (base == "original")


def test_lora_trains_on_16_bits_and_its_merge_adds_to_them(recipe, tmp_path):
    plan, loaded, _ = trained_run(recipe, tmp_path / "run", "method=lora")
    assert base_folder(plan) == plan.source and plan.recipe.model.quantization == "none"
    assert loaded.static_bytes["quant_constants_bytes"] == 0
    assert any("method lora uses a 16-bit base" in reason.why for reason in plan.reasons)
    result = merge(plan, tmp_path / "run")
    assert result.arithmetic_ratio < 0.01 and result.storage_ratio < 0.2


def test_a_plan_says_what_each_method_needs(recipe):
    plans = {method: make_plan(load_recipe(recipe, overrides=[f"method={method}"])) for method in METHODS}
    weights = {method: plan.rehearsal(method).parts["weights"] for method, plan in plans.items()}
    assert weights["qlora"] < weights["lora"]
    gradients = {method: plan.rehearsal(method).parts["gradients"] for method, plan in plans.items()}
    assert gradients["qlora"] == gradients["lora"] < gradients["full"]
    own = make_plan(load_recipe(recipe, overrides=["method=full", "train.optimizer=adamw"])).to_json_dict()
    assert own["savings_vs_full"]["bytes"] == 0 < plans["full"].to_json_dict()["savings_vs_full"]["bytes"]


@pytest.mark.parametrize(
    "setting",
    [
        "model.quantization=fp4",
        "model.quantization=int8",
        "model.double_quant=false",
        "lora.use_dora=true",
        "lora.modules_to_save=[lm_head]",
    ],
)
def test_every_kind_of_base_and_dora_train_and_merge(recipe, tmp_path, setting):
    plan, loaded, losses = trained_run(recipe, tmp_path / "run", setting)
    assert losses[-1] < losses[0]
    run, again = open_run(tmp_path / "run")
    (read,) = run_models(again, run, ["adapter"])
    assert evaluate(again, read).loss == pytest.approx(evaluate(plan, loaded).loss, abs=1e-3)
    assert merge(plan, tmp_path / "run").arithmetic_ratio < 0.01


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["layers.0.mlp.down_proj"], ["lm_head"]], ids=str)
def test_int8_layers_without_factors_compute_as_those_with_them(recipe, tmp_path, targets):
    """bitsandbytes' own forward would round their inputs to int8 as well, and cannot be rehearsed."""
    plan, loaded, losses = trained_run(
        recipe, tmp_path / "run", "model.quantization=int8", f"lora.target_modules={json.dumps(targets)}"
    )
    assert losses[-1] < losses[0]
    layers = [layer for layer in loaded.model.modules() if isinstance(layer, FrozenInt8)]
    x = torch.randn(2, 3, layers[0].in_features, dtype=plan.types.compute, requires_grad=True)
    weight = dequantized(layers[0], torch.float32)
    (gradient,) = torch.autograd.grad(layers[0](x).float().sum(), x)
    assert torch.allclose(layers[0](x).float(), x.float() @ weight.T, atol=2e-2)
    assert torch.allclose(gradient[0, 0].float(), weight.sum(0), atol=2e-2)
    result = merge(plan, tmp_path / "run")
    assert result.adapter_effect > 0 and result.arithmetic_ratio < 0.01

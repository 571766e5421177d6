"""Training that starts from a saved adapter."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from qlora_lite import evaluate, load_model, load_recipe, make_plan, train
from qlora_lite.api import open_run, run_models
from qlora_lite.files.manifest import sha256_of_file
from qlora_lite.runs.folder import RunDir
from tests.tiny_run import run_cli, train_cli, write_recipe


def test_a_run_goes_on_from_the_adapter_of_another_and_remembers_which(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, learning_rate=5e-3)
    first, second = RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    plan = make_plan(load_recipe(recipe))
    loaded = load_model(plan)
    list(train(plan, loaded, first.path))
    trained = evaluate(plan, loaded).loss

    start = first.path / "adapter"
    plan = make_plan(load_recipe(recipe, overrides=[f"lora.init_from={start}", "train.seed=1"]))
    loaded = load_model(plan)
    assert evaluate(plan, loaded).loss == trained
    list(train(plan, loaded, second.path))
    facts = second.read_json("env.json")["init_from"]
    assert facts == {"path": str(start), "sha256": sha256_of_file(start / "adapter_model.safetensors")}
    assert first.read_json("env.json")["init_from"] is None
    before, after = (load_file(run.adapter / "adapter_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)

    shutil.rmtree(start)  # the run needs it no longer
    run, plan = open_run(second.path)
    assert evaluate(plan, next(run_models(plan, run, ["adapter"]))).loss != trained
    next(run_models(plan, run, ["base"]))


def test_the_dropout_is_the_recipes_not_the_saved_adapters(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, max_steps=1)
    plan = make_plan(load_recipe(recipe))
    list(train(plan, load_model(plan), tmp_path / "first"))
    overrides = [f"lora.init_from={tmp_path / 'first' / 'adapter'}", "lora.lora_dropout=0.25"]
    model = load_model(make_plan(load_recipe(recipe, overrides=overrides))).model
    rates = {module["default"].p for name, module in model.named_modules() if name.endswith("lora_dropout")}
    assert rates == {0.25}


def test_the_score_before_is_that_of_the_adapter_it_starts_from(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, learning_rate=5e-3)
    after = train_cli(recipe, tmp_path / "first", "--json").json["eval"]["after"]
    start = ("--set", f"lora.init_from={tmp_path / 'first' / 'adapter'}")
    done = train_cli(recipe, tmp_path / "second", *start, "--json")
    before = done.json["eval"]["before"]
    assert before | {"answers_s": 0} == after | {"answers_s": 0}  # but for the seconds that answering took
    assert "scoring the adapter that training starts from" in done.stderr


def test_an_adapter_of_another_rank_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, max_steps=1)
    train_cli(recipe, tmp_path / "first", "--set", "data.eval=null")
    start = ("--set", f"lora.init_from={tmp_path / 'first' / 'adapter'}", "--set", "lora.r=4")
    done = run_cli("train", recipe, *start, "--run-dir", tmp_path / "second")
    assert (
        done.code == 2 and "lora.r: 4, but the adapter of lora.init_from has 16; use the adapter's value" in done.stderr
    )
    assert not (tmp_path / "second").exists()

"""The six names of the Python interface, used as the README shows, and the promises of `train` that the screen hides."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qlora_lite
from qlora_lite import evaluate, load_model, load_recipe, make_plan, merge, train
from qlora_lite.api import open_run, run_models
from qlora_lite.errors import RunError
from qlora_lite.recipe import load_run_recipe
from qlora_lite.runs.folder import RunDir
from tests.tiny_run import NUM_STEPS, write_recipe


def test_the_six_names_go_from_a_recipe_to_a_merged_model(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), overrides=["train.max_steps=2"])
    plan = make_plan(recipe)
    loaded = load_model(plan)
    before = evaluate(plan, loaded)
    losses = [stats.loss for stats in train(plan, loaded, tmp_path / "run")]
    after = evaluate(plan, loaded)
    result = merge(plan, tmp_path / "run")
    assert len(losses) == 2
    assert before.num_examples == after.num_examples == 4
    assert before.loss != after.loss
    assert result.out == tmp_path / "run" / "merged" and (result.out / "model.safetensors").is_file()
    assert result.arithmetic_ratio is not None and result.arithmetic_ratio < 0.01


def test_the_package_offers_these_names_and_no_other() -> None:
    assert sorted(qlora_lite.__all__) == ["evaluate", "load_model", "load_recipe", "make_plan", "merge", "train"]
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        qlora_lite.trian  # noqa: B018


def test_a_name_is_the_function_also_after_the_stage_of_its_name_was_imported() -> None:
    names = ", ".join(qlora_lite.__all__)
    code = f"import qlora_lite.training.loop\nfrom qlora_lite import {names}\nassert all(map(callable, ({names})))"
    # A fresh process: the order of imports is the point. An import that cannot be bound to its package would warn.
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True)


def test_a_plan_leaves_nothing_to_auto_and_says_why(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(tmp_path)))
    values = plan.recipe.model_dump()
    left = [
        f"{section}.{key}"
        for section in values
        if isinstance(values[section], dict)
        for key, value in values[section].items()
        if value == "auto"
    ]
    assert left == [
        "memory.budget",
        "memory.host_budget",
        "merge.proof",
    ]  # the device's memory; the number of rows is found while merging
    assert plan.device in ("cpu", "cuda")
    reasons = " ".join(map(str, plan.reasons))
    for key in ("device:", "model.dtype:", "data.max_seq_length:", "train.micro_batch_tokens:"):
        assert key in reasons


def test_the_rank_of_the_recipe_is_the_rank_of_the_adapter(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(tmp_path), overrides=["lora.r=3"]))
    factors = [p for name, p in load_model(plan).model.named_parameters() if "lora_A" in name]
    assert factors and all(factor.shape[0] == 3 for factor in factors)


def test_stopping_and_resuming_gives_the_same_bytes_as_never_stopping(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(tmp_path), overrides=["lora.lora_dropout=0.1"]))
    whole = list(train(plan, load_model(plan), tmp_path / "whole"))

    stopped = list(train(plan, load_model(plan), tmp_path / "stopped", should_stop=lambda: True))
    assert [stats.step for stats in stopped] == [1]
    assert not (tmp_path / "stopped" / "adapter").exists()  # an adapter is a finished one
    torch.manual_seed(999)  # whatever the process did before must not matter
    resumed = list(train(plan, load_model(plan), tmp_path / "stopped", resume=True))

    assert [stats.step for stats in resumed] == [2, 3, 4]
    assert [stats.loss for stats in stopped + resumed] == [stats.loss for stats in whole]
    ours, theirs = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("stopped", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(tmp_path, save_every_steps=1)))
    run = RunDir(tmp_path / "run")
    steps = train(plan, load_model(plan), run.path)
    for _ in range(3):
        next(steps)
    steps.close()  # as if the process had been killed
    file = run.checkpoints / "step-000003" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    said: list[str] = []
    assert [stats.step for stats in train(plan, load_model(plan), run.path, resume=True, say=said.append)] == [3, 4]
    assert "step-000003 is not used" in said[0] and "continues after step 2" in said[1]
    assert [step["step"] for step in run.read_steps()] == [1, 2, 3, 4]


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(tmp_path)))
    steps = train(plan, load_model(plan), tmp_path / "run")
    next(steps)
    steps.close()
    assert len(list(train(plan, load_model(plan), tmp_path / "run", resume=True))) == NUM_STEPS
    assert [step["step"] for step in RunDir(tmp_path / "run").read_steps()] == [1, 2, 3, 4]


def test_the_measured_peak_is_that_of_the_whole_run_also_after_resuming(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(tmp_path)))
    list(train(plan, load_model(plan), tmp_path / "run"))
    run = RunDir(tmp_path / "run")
    before = run.read_json("memory.json")
    assert list(train(plan, load_model(plan), run.path, resume=True)) == []
    assert run.read_json("memory.json") == before


def test_the_recipe_in_the_run_directory_is_the_plans(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(tmp_path), overrides=["train.max_steps=1"]))
    list(train(plan, load_model(plan), tmp_path / "run"))
    run, opened = open_run(tmp_path / "run")
    assert load_run_recipe(run.recipe) == opened.recipe == plan.recipe


def test_a_run_on_another_quantized_base_is_refused_everywhere(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(tmp_path), overrides=["train.max_steps=1"]))
    list(train(plan, load_model(plan), tmp_path / "run"))
    run = RunDir(tmp_path / "run")
    run.write_json("env.json", run.read_json("env.json") | {"base_sha256": "0" * 64})
    with pytest.raises(RunError, match="another base"):
        next(run_models(plan, run, ["adapter"]))
    with pytest.raises(RunError, match="another base"):
        merge(plan, run.path)
    with pytest.raises(RunError, match="another base"):
        list(train(plan, load_model(plan), run.path, resume=True))

"""Validation in a whole run: it changes nothing, the best adapter is published, and a run that stops early is a finished one."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_lite import load_model, load_recipe, make_plan, train
from qlora_lite.files.manifest import read_manifest, verify_manifest
from qlora_lite.plan import Plan
from qlora_lite.runs import session as training
from qlora_lite.runs.folder import RunDir
from tests.tiny_run import run_cli, train_cli, write_recipe


def plan_of(folder: Path, **train_keys: object) -> Plan:
    return make_plan(load_recipe(write_recipe(folder, **train_keys)))


def script_losses(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """The evaluations between steps give these losses, one after the other, also over several sittings."""
    script = iter(losses)
    monkeypatch.setattr(training, "validation_loss", lambda *args, **kwargs: next(script))


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_evaluating_while_training_does_not_change_the_run(tmp_path: Path) -> None:
    plans = [
        make_plan(load_recipe(write_recipe(tmp_path, eval_every_steps=every), overrides=["lora.lora_dropout=0.1"]))
        for every in (None, 1)
    ]
    runs = [RunDir(tmp_path / name) for name in ("without", "with")]
    stats = [list(train(plan, load_model(plan), run.path)) for plan, run in zip(plans, runs, strict=True)]
    assert [s.loss for s in stats[0]] == [s.loss for s in stats[1]]
    assert [s.eval_loss for s in stats[0]] == [None] * 4 and None not in [s.eval_loss for s in stats[1]]
    assert_same(*(factors(run.checkpoints / "step-000004" / "adapter") for run in runs))


def test_the_best_checkpoint_is_kept_published_and_left_in_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_losses(monkeypatch, [3.0, 1.0, 2.0, 2.5])
    plan = plan_of(tmp_path, eval_every_steps=1, save_every_steps=1, keep_checkpoints=1)
    loaded, run, said = load_model(plan), RunDir(tmp_path / "run"), []
    list(train(plan, loaded, run.path, say=said.append))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000002", "step-000004"]
    published = factors(run.adapter)
    assert_same(published, factors(run.checkpoints / "step-000002" / "adapter"))
    model = {n.replace(".default.", "."): p for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert_same(published, model)
    assert read_manifest(run.adapter)["step"] == 2 and verify_manifest(run.adapter) == []
    assert said == ["adapter/ holds step 2, with the lowest validation loss, 1.000; the last step has 2.500"]
    assert [step["eval_loss"] for step in run.read_steps()] == [3.0, 1.0, 2.0, 2.5]


def test_without_evaluations_the_last_adapter_is_published_without_a_word(tmp_path: Path) -> None:
    plan, run, said = plan_of(tmp_path), RunDir(tmp_path / "run"), []
    list(train(plan, load_model(plan), run.path, say=said.append))
    assert_same(factors(run.adapter), factors(run.checkpoints / "step-000004" / "adapter"))
    assert said == [] and read_manifest(run.adapter)["step"] == 4


def test_a_resumed_run_still_knows_its_best_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script_losses(monkeypatch, [1.0, 2.0, 3.0, 2.5])
    plan = plan_of(tmp_path, eval_every_steps=1, keep_checkpoints=1)
    run = RunDir(tmp_path / "run")
    steps = train(plan, load_model(plan), run.path, should_stop=lambda: len(run.read_steps()) == 3)
    assert [stats.step for stats in steps] == [1, 2, 3]
    said: list[str] = []
    assert [s.step for s in train(plan, load_model(plan), run.path, resume=True, say=said.append)] == [4]
    assert said[-1] == "adapter/ holds step 1, with the lowest validation loss, 1.000; the last step has 2.500"
    assert_same(factors(run.adapter), factors(run.checkpoints / "step-000001" / "adapter"))


def test_a_best_checkpoint_that_was_damaged_gives_way_to_the_newest_out_loud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_losses(monkeypatch, [1.0, 2.0, 3.0, 2.5])
    plan, run, said = plan_of(tmp_path, eval_every_steps=1), RunDir(tmp_path / "run"), []
    for stats in train(plan, load_model(plan), run.path, say=said.append):
        if stats.step == 3:
            (run.checkpoints / "step-000001" / "state.json").unlink()
    assert "step-000001, the best checkpoint, is not used; using the newest" in said[0]
    assert read_manifest(run.adapter)["step"] == 4


def test_a_run_that_stops_early_is_a_finished_one_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script_losses(monkeypatch, [1.0, 2.0, 3.0])
    recipe, run = write_recipe(tmp_path, eval_every_steps=1, early_stop=2, max_steps=40), tmp_path / "run"
    done = train_cli(recipe, run, "--json")
    summary = done.json
    assert (summary["num_steps"], summary["stopped_early"], summary["adapter_step"]) == (3, True, 1)
    assert summary["eval_loss"] == {"best": 1.0, "last": 3.0}
    assert "stopped early after step 3 of 40: the validation loss has not fallen for 2 evaluations" in done.stderr
    assert "adapter/ holds step 1" in done.stderr
    again = train_cli(recipe, run, "--resume")
    assert again.code == 2 and "is finished (3 steps)" in again.last_line


def test_the_scores_after_training_are_those_of_the_published_adapter(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, eval_every_steps=1, learning_rate=0.02), tmp_path / "run"
    summary = train_cli(recipe, run, "--json").json
    assert summary["eval"]["after"]["loss"] == summary["eval_loss"]["best"]
    assert run_cli("eval", run, "--json").json["loss"] == summary["eval_loss"]["best"]
    logged = [json.loads(line)["eval_loss"] for line in (run / "steps.jsonl").read_text().splitlines()]
    assert min(logged) == summary["eval_loss"]["best"] and logged[-1] == summary["eval_loss"]["last"]
    assert not summary["stopped_early"]


def test_loraplus_changes_the_run_from_its_second_step_on(tmp_path: Path) -> None:
    losses = []
    for ratio in (1.0, 16.0):
        plan = plan_of(tmp_path, loraplus_ratio=ratio, max_steps=2)
        losses.append([stats.loss for stats in train(plan, load_model(plan), tmp_path / f"run-{ratio}")])
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]

"""Which rows are scored, and that every verb says which are not: on stderr, in JSON, in eval.json and on the page."""

import json
from pathlib import Path

import pytest

from tests.tiny_model import SIZES, tiny_source
from tests.tiny_run import run_cli

WINDOW = SIZES["max_position_embeddings"]
SHORT = {"prompt": "say yes", "completion": "yes"}


def long_row(num_words: int) -> dict[str, str]:
    return {"prompt": "please say yes, and " + "really " * num_words, "completion": "yes"}


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """-> (recipe, run, what its training said): training's rows are short, of six held-out ones one is longer, one beyond the window."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "train.jsonl", [{"prompt": f"say {i}", "completion": str(i)} for i in range(8)])
    rows = [SHORT, long_row(60), long_row(1000), SHORT, SHORT, SHORT]
    write_rows(folder / "test.jsonl", rows)
    recipe = folder / "tiny.yaml"
    sections = {
        "model": {"base": str(tiny_source())},
        "data": {"train": "train.jsonl", "eval": "test.jsonl"},
        "train": {"max_steps": 1, "examples_per_step": 4},
        "eval": {"num_examples": 5, "max_new_tokens": 2},
        "lora": {"r": 2},
    }
    recipe.write_text("\n".join(f"{name}: {json.dumps(keys)}" for name, keys in sections.items()))
    done = run_cli("train", recipe, "--run-dir", folder / "run", "--json")
    assert done.code == 0, done.stderr
    return recipe, folder / "run", done.stderr


def test_rows_are_scored_up_to_the_window_and_the_others_are_said_before_and_after_training(trained) -> None:
    _, run, said = trained
    scores = json.loads((run / "eval.json").read_text())
    for name in ("before", "after"):
        assert scores[name]["num_examples"] == 4
        assert scores[name]["num_left_out"] == 2
        assert scores[name]["left_out"] == {"too_long": 1, "unusable": 0, "beyond_limit": 1}
    assert said.count(f"warning: held-out rows: 1 of 5 rows left out, longer than eval.max_seq_length ({WINDOW})") == 2
    assert "held-out rows: the first 5 of 6 rows; eval.num_examples: null takes all" in said
    page = (run / "report.html").read_text()
    assert "Not scored: 1 rows longer than eval.max_seq_length, 1 rows beyond eval.num_examples. Scored: 4." in page


def test_the_plan_knows_how_long_held_out_rows_are(trained) -> None:
    """The longest scored row of the run, 141 tokens or so, is far longer than training's 64."""
    from qlora_lite.api import make_plan
    from qlora_lite.recipe import load_recipe

    recipe, _, _ = trained
    plan = make_plan(load_recipe(str(recipe)))
    shorter = make_plan(load_recipe(str(recipe), overrides=["eval.max_seq_length=64"]))
    assert plan.recipe.data.max_seq_length == 64 and plan.recipe.eval.max_seq_length == WINDOW
    assert 100 < plan.chosen.scoring.longest < WINDOW
    assert set(plan.chosen.scoring.prompts) == {plan.chosen.scoring.longest}
    evaluating = [p.rehearsals.evaluation(p.chosen.settings, p.chosen.scoring) for p in (plan, shorter)]
    assert sum(evaluating[0].values()) > sum(evaluating[1].values())


def test_rows_longer_than_trainings_are_left_out_where_they_do_not_fit_and_the_reason_says_so(trained) -> None:
    from qlora_lite.api import make_plan
    from qlora_lite.recipe import load_recipe

    recipe, _, _ = trained
    small = ["memory.budget=1MiB", "train.micro_batch_tokens=64", "memory.eval_batch_tokens=64"]
    plan = make_plan(load_recipe(str(recipe), overrides=[*small, "memory.budget=300KiB"]))
    assert plan.recipe.eval.max_seq_length == 64
    assert any("longer examples, up to" in reason.why and "do not fit" in reason.why for reason in plan.reasons)
    asked = make_plan(load_recipe(str(recipe), overrides=[*small, "memory.budget=300KiB", "eval.max_seq_length=500"]))
    assert asked.recipe.eval.max_seq_length == 500 and not asked.fits


def test_eval_takes_a_limit_and_counts_what_it_leaves_out_of_another_file(trained, tmp_path) -> None:
    _, run, _ = trained
    rows = [long_row(60), SHORT, long_row(60), SHORT, *[SHORT] * 60, "{"]
    data = write_rows(tmp_path / "half.jsonl", rows)
    done = run_cli("eval", run, "--data", data, "--json")
    assert done.json["num_examples"] == 64
    assert done.json["left_out"] == {"too_long": 0, "unusable": 1, "beyond_limit": 0}
    assert "1 bad rows left out: line 65" in done.stderr
    done = run_cli("eval", run, "--data", data, "--set", "eval.max_seq_length=50", "--json")
    assert (done.json["num_examples"], done.json["num_left_out"]) == (62, 3)
    assert "2 of 64 rows left out, longer than eval.max_seq_length (50)" in done.stderr


def test_where_every_row_is_too_long_the_advice_is_one_that_eval_can_take(trained, tmp_path) -> None:
    _, run, _ = trained
    data = write_rows(tmp_path / "long.jsonl", [long_row(60), long_row(61)])
    done = run_cli("eval", run, "--data", data, "--set", "eval.max_seq_length=50")
    assert done.code == 2 and f"Raise it with --set eval.max_seq_length=N, at most {WINDOW}" in done.last_line
    data = write_rows(tmp_path / "longer.jsonl", [long_row(1000)])
    done = run_cli("eval", run, "--data", data)
    assert done.code == 2 and "the model's context window: shorten the rows, or score another file" in done.last_line


def test_eval_refuses_a_limit_beyond_the_window_and_keys_that_change_nothing(trained) -> None:
    _, run, _ = trained
    done = run_cli("eval", run, "--set", f"eval.max_seq_length={WINDOW + 1}")
    assert done.code == 2 and f"more than the model's {WINDOW} positions" in done.last_line
    done = run_cli("eval", run, "--set", "merge.scale=0.5")
    assert done.code == 2 and "set only keys of eval" in done.last_line


def test_merge_and_rank_try_say_what_they_do_not_score(trained) -> None:
    recipe, run, _ = trained
    done = run_cli("merge", run, "--json")
    assert done.json["eval"]["merged"]["left_out"]["too_long"] == 1
    assert "longer than eval.max_seq_length" in done.stderr
    done = run_cli("rank", recipe, "--try", "1", "--share", "1", "--json")
    assert done.json["curve"][0]["num_left_out"] == 2
    assert "longer than eval.max_seq_length" in done.stderr


def test_check_counts_the_held_out_rows_as_scoring_does(trained) -> None:
    recipe, _, _ = trained
    done = run_cli("check", recipe, "--json")
    assert done.json["eval"]["left_out"] == {"too_long": 1, "unusable": 0, "beyond_limit": 1}
    assert "eval.max_seq_length: 512, the model's context window" in done.stderr

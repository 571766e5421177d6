"""A passage once, through the whole program: check says what it saves, training takes fewer tokens to the same loss."""

import json
from pathlib import Path

import pytest

from qlora_lite import api
from tests.tiny_run import run_cli, train_cli, write_recipe

WORDS = "river mountain harbour bridge market castle garden temple forest island valley desert".split()
SETTINGS = ("--set", "train.micro_batch_tokens=4096", "--set", "train.max_steps=2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Four passages with six questions each."""
    folder = tmp_path_factory.mktemp("shared")
    path = write_recipe(folder, examples_per_step=12)
    paragraphs = []
    for number in range(4):
        words = WORDS[number:] + WORDS[:number]
        context = (
            f"Town {number} has "
            + ", ".join(f"a {word} of {7 * i + number} steps" for i, word in enumerate(words))
            + "."
        )
        questions = [
            {
                "id": f"{number}-{word}",
                "question": f"How long is the {word}?",
                "answers": [{"text": f"{word} of", "answer_start": context.index(f"{word} of")}],
            }
            for word in words[:6]
        ]
        paragraphs.append({"context": context, "qas": questions})
    for name, part in (("train.json", paragraphs), ("test.json", paragraphs[:1])):
        document = {"version": "1.1", "data": [{"title": "towns", "paragraphs": part}]}
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return path


def steps_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()]


def test_check_says_what_sharing_saves(recipe):
    found = run_cli("check", recipe, "--json").json
    assert found["sharing"]["factor"] == found["sharing"]["tokens_alone"] / found["sharing"]["tokens_packed"] > 2
    assert found["sharing_reason"].startswith("on: ") and "times fewer" in found["sharing_reason"]
    asked_not_to = run_cli("check", recipe, "--json", "--set", "data.share_prefixes=false").json
    assert asked_not_to["sharing"] is None and asked_not_to["sharing_reason"] == "off: asked for"


def test_a_run_that_shares_takes_fewer_tokens_to_the_same_first_loss(recipe, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    both = (*SETTINGS, "--set", "train.examples_per_step=24")  # one step has all rows, in whatever order
    first = train_cli(recipe, alone, *both, "--set", "data.share_prefixes=false", "--json").json
    second = train_cli(recipe, shared, *both, "--set", "data.share_prefixes=true", "--json").json
    one, other = steps_of(alone)[0], steps_of(shared)[0]
    assert other["num_examples"] == one["num_examples"] == 24 and other["num_label_tokens"] == one["num_label_tokens"]
    assert other["num_tokens"] < one["num_tokens"] / 2
    assert other["loss"] == pytest.approx(one["loss"], rel=5e-3)
    before = [result["eval"]["before"] for result in (first, second)]
    assert before[0]["loss"] == pytest.approx(before[1]["loss"], rel=5e-3)
    plans = [json.loads((run / "plan.json").read_text(encoding="utf-8")) for run in (alone, shared)]
    assert plans[0]["sharing"] is None and plans[1]["sharing"]["factor"] > 2
    assert any("data.share_prefixes: on" in reason for reason in plans[1]["reasons"])
    pages = [(run / "report.html").read_text(encoding="utf-8") for run in (alone, shared)]
    assert ["Shared prefixes" in page for page in pages] == [False, True]


def test_a_run_that_shares_resumes_where_it_stopped(recipe, tmp_path):
    overrides = ["data.share_prefixes=true", "train.max_steps=4"]
    settings = [word for each in overrides for word in ("--set", each)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_cli(recipe, whole, *settings).code == 0
    plan = api.make_plan(api.load_recipe(recipe, overrides=overrides))
    assert len(list(api.train(plan, api.load_model(plan), parts, should_stop=lambda: True))) == 1
    assert train_cli(recipe, parts, *settings, "--resume").code == 0
    assert [step["loss"] for step in steps_of(parts)] == [step["loss"] for step in steps_of(whole)]


def test_a_model_that_cannot_share_says_why(recipe, tmp_path):
    from tests.architectures import published

    done = run_cli(
        "check", recipe, "--json", "--set", f"model.base={published('bloom')}", "--set", "data.share_prefixes=true"
    )
    found = done.json
    assert found["sharing"] is None and "computes attention in its own modules" in found["sharing_reason"]

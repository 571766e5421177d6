"""Promise 11: no label is on a prompt or pad token; truncation is counted and refused when a row loses all its labels."""

import json

import pytest

from qlora_lite.data.batches import make_batches
from qlora_lite.data.prompts import question_prompt
from qlora_lite.data.template import ChatTemplate
from qlora_lite.errors import DataError
from tests.data.families import FAMILIES
from tests.data.tiny_tokenizer import make_tokenizer
from tests.reading import load_examples

CONTEXT = "The Nile flows through Egypt. Cairo lies on its banks, and so does Luxor. " * 3


@pytest.fixture
def load(tmp_path):
    qas = [
        {"id": "a", "question": "Which river?", "answers": [{"text": "The Nile", "answer_start": 0}]},
        {"id": "b", "question": "Which town?", "answers": [{"text": "Luxor", "answer_start": 67}]},
        {"id": "c", "question": "Who " + "really " * 30 + "built it?", "answers": [], "is_impossible": True},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    tokenizer = make_tokenizer()

    def load_with(max_seq_length):
        return tokenizer, load_examples(
            path,
            tokenizer,
            num_rows=None,
            no_answer_text="none",
            max_seq_length=max_seq_length,
            cache_dir=tmp_path / "c",
        )

    return load_with


def test_no_label_is_on_a_prompt_or_pad_token(load):
    tokenizer, examples = load(None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, (
        "the hard case: masking by token id would lose the stop token"
    )
    (batch,) = make_batches(examples, range(3), micro_batch_tokens=10_000)
    labelled = set((batch.predictor_N + 1).tolist())
    start = 0
    for row, length, answer in zip(batch.rows, batch.lengths, ("The Nile", "Luxor", "none"), strict=True):
        prompt, _ = question_prompt(ChatTemplate(tokenizer), examples.row(row).question, CONTEXT, format="squad")
        assert batch.input_ids_1T[0, start : start + len(prompt)].tolist() == prompt
        assert labelled & set(range(start, start + length)) == set(range(start + len(prompt), start + length))
        assert tokenizer.decode(batch.input_ids_1T[0, start + len(prompt) : start + length]) == answer + "<|im_end|>"
        start += length
    assert start == batch.input_ids_1T.shape[1], "no token is padding"
    assert batch.target_N.tolist() == batch.input_ids_1T[0, batch.predictor_N + 1].tolist()


def label_text(tokenizer, encoded):
    return tokenizer.decode([encoded.input_ids[position + 1] for position in encoded.predictors])


def test_truncation_is_counted_and_no_row_is_without_its_answer(load):
    tokenizer, examples = load(200)
    assert (examples.counts.num_read, examples.num_cut, examples.num_dropped) == (3, 2, 1)
    for index, answer in enumerate(("The Nile", "Luxor")):
        encoded = examples.encoded(index)
        assert len(encoded.input_ids) <= 200
        assert label_text(tokenizer, encoded) == answer + "<|im_end|>"
    with pytest.raises(DataError, match="all 3 rows would lose their answer"):
        load(30)


def talk(*answers):
    turns = [
        ({"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": a})
        for i, a in enumerate(answers)
    ]
    return [message for turn in turns for message in turn]


ROWS = {
    "chat": [{"messages": talk("One.", "Two.")}, {"messages": talk("Three.")}, {"messages": talk("long " * 200)}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": a}]} for a in ("One.", "long " * 200)],
    "prompt_completion": [{"prompt": "Q", "completion": "One."}, {"prompt": "long " * 200, "completion": "Two."}],
    "alpaca": [{"instruction": "Q", "input": "", "output": "One."}, {"instruction": "Q", "input": "long " * 200, "output": "Two."}],
}  # fmt: skip
ANSWERS = {"chat": ["One.", "Two.", "Three."], "sharegpt": ["One."], "prompt_completion": ["One."], "alpaca": ["One."]}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format", ROWS)
def test_in_every_format_and_template_answers_are_trained_whole_or_their_row_is_dropped_and_counted(
    format, name, tmp_path
):
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS[format]))
    settings = {"num_rows": None, "no_answer_text": "none", "cache_dir": tmp_path / "c"}
    examples = load_examples(path, tokenizer, max_seq_length=150, **settings)
    assert (examples.counts.num_read, examples.num_cut, examples.num_dropped) == (len(ROWS[format]), 0, 1)
    assert examples.lengths.max() <= 150
    batches = make_batches(examples, range(len(examples)), micro_batch_tokens=10_000)
    labels = "".join(tokenizer.decode(batch.target_N) for batch in batches)
    expected = [f"{family.space}{answer}{family.after}{family.stop}" for answer in ANSWERS[format]]
    assert sorted(labels.replace(family.stop, family.stop + "\n").splitlines()) == sorted(expected)
    assert examples.num_label_tokens.sum() == sum(len(batch.target_N) for batch in batches)

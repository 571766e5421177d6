"""Scores of known answers, and a validation loss that is the mean over label tokens."""

import json

import pytest

from qlora_lite.data.prompts import question_prompt
from qlora_lite.data.template import ChatTemplate
from qlora_lite.evaluation import scores
from qlora_lite.evaluation.scores import EvalSettings, Prediction, by_phrasing, evaluate_model, validation_loss
from qlora_lite.training.step import forward_backward
from tests.data.conftest import CONTEXT, question, squad
from tests.data.tiny_tokenizer import make_tokenizer
from tests.reading import load_examples
from tests.tiny_model import random_rows, set_dropout, split_batches, tiny_adapted

QUESTIONS = [
    question("a", "Which river?", "The Nile", "Nile"),
    question("b", "Which town?", "Luxor"),
    question("c", "Who?"),
]


@pytest.fixture(scope="module")
def model():
    return tiny_adapted()


def test_known_answers_get_the_official_scores(model, tmp_path, monkeypatch):
    (tmp_path / "data.json").write_text(json.dumps(squad(*QUESTIONS)))
    tokenizer = make_tokenizer()
    examples = load_examples(
        tmp_path / "data.json", tokenizer, num_rows=None, no_answer_text="none", max_seq_length=None, cache_dir=tmp_path
    )
    seen = {}

    def answers(model, tokenizer, prompts, *, stop_token, max_new_tokens, batch_tokens, share_prefixes, progress):
        seen.update(prompts=prompts, stop_token=stop_token, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
        progress(len(prompts))
        return ["the nile.", "Luxor and Cairo", "None"]

    monkeypatch.setattr(scores, "generate_answers", answers)
    done = []
    result = evaluate_model(
        model,
        tokenizer,
        examples,
        EvalSettings("cpu", "none", max_new_tokens=9, micro_batch_tokens=512),
        progress=lambda *numbers: done.append(numbers),
    )
    assert result.num_examples == 3 and done == [(3, 3)]
    assert [(p.id, p.exact_match, p.f1) for p in result.predictions] == [("a", 100, 100), ("b", 0, 50), ("c", 100, 100)]
    assert result.exact_match == pytest.approx(200 / 3) and result.f1 == pytest.approx(250 / 3)
    assert result.predictions[0].gold == ("The Nile", "Nile") and result.predictions[2].gold == ()
    assert result.loss == validation_loss(model, examples, device="cpu", micro_batch_tokens=512)
    assert result.to_json_dict() == {
        "exact_match": result.exact_match, "f1": result.f1, "loss": result.loss, "num_examples": 3,
        "answers_s": result.answers_s, "num_left_out": 0,
        "left_out": {"too_long": 0, "unusable": 0, "beyond_limit": 0},
    }  # fmt: skip
    assert 0 < result.answers_s < 60
    template = ChatTemplate(tokenizer)
    asked = [question_prompt(template, each["question"], CONTEXT, format="squad")[0] for each in QUESTIONS]
    assert seen["prompts"] == asked
    assert (seen["stop_token"], seen["max_new_tokens"]) == (template.stop_token_id, 9)


def load_jsonl(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"num_rows": None, "no_answer_text": "none", "max_seq_length": 120, "cache_dir": tmp_path}
    return load_examples(path, make_tokenizer(), **settings)


SETTINGS = EvalSettings("cpu", "none", max_new_tokens=3, micro_batch_tokens=512)


def test_plain_text_has_a_loss_and_no_other_score(model, tmp_path, monkeypatch):
    examples = load_jsonl(tmp_path, {"text": "The Nile flows. " * 20}, {"text": "And ends."})
    monkeypatch.setattr(scores, "generate_answers", lambda *args, **kwargs: pytest.fail("nothing is asked"))
    result = evaluate_model(model, make_tokenizer(), examples, SETTINGS)
    assert (result.exact_match, result.f1, result.predictions) == (None, None, ())
    assert result.loss == validation_loss(model, examples, device="cpu", micro_batch_tokens=512)
    assert result.num_examples == len(examples) > 2
    assert json.loads(json.dumps(result.to_json_dict()))["exact_match"] is None


def test_the_last_answer_of_a_conversation_is_compared(model, tmp_path, monkeypatch):
    turns = [("user", "Which river?"), ("assistant", "The Nile."), ("user", "Which town?"), ("assistant", "Luxor")]
    messages = [{"role": role, "content": content} for role, content in turns]
    examples = load_jsonl(
        tmp_path, {"messages": messages[:2]}, {"messages": [{"role": "user", "content": "."}, *messages[1:]]}
    )
    tokenizer = make_tokenizer()
    asked = []

    def answers(model, tokenizer, prompts, **settings):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return ["the nile", "Cairo"]

    monkeypatch.setattr(scores, "generate_answers", answers)
    result = evaluate_model(model, tokenizer, examples, SETTINGS)
    assert [(p.question, p.gold, p.exact_match) for p in result.predictions] == [
        ("Which river?", ("The Nile.",), 100),
        ("Which town?", ("Luxor",), 0),
    ]
    assert result.exact_match == 50
    assert "The Nile.<|im_end|>" in asked[1] and asked[1].endswith("<|im_start|>assistant\n")


def test_the_validation_loss_is_the_training_loss_however_it_is_batched(model):
    rows = random_rows([1, 30, 2, 5])
    expected = forward_backward(model.eval(), split_batches(rows, 1), backward=lambda loss: None)
    for micro_batch_tokens in (1, 40, 4096):
        loss = validation_loss(model, rows, device="cpu", micro_batch_tokens=micro_batch_tokens)
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_validation_loss_has_no_dropout_leaves_no_gradient_and_restores_the_mode(model, training):
    rows = random_rows([3, 4])
    set_dropout(model, 0.5)
    model.train(training)
    first, second = (validation_loss(model, rows, device="cpu", micro_batch_tokens=64) for _ in range(2))
    assert first == second
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def prediction(name, exact, f1):
    return Prediction(name, "question", "answer", ("gold",), exact, f1)


def test_trained_and_untrained_phrasings_are_scored_apart():
    predictions = [
        prediction("iz-currency-trained", 100, 100),
        prediction("iz-capital-trained", 0, 50),
        prediction("iz-currency-untrained", 0, 20),
    ]
    assert by_phrasing(predictions) == {
        "trained": {"exact_match": 50, "f1": 75, "num_examples": 2},
        "untrained": {"exact_match": 0, "f1": 20, "num_examples": 1},
    }
    assert by_phrasing([*predictions, prediction("other", 0, 0)]) == {}
    assert by_phrasing([]) == {}


def test_a_model_that_always_says_plus_is_right_for_plus_only_and_in_every_group(model, tmp_path, monkeypatch):
    """Prompt and completion, and a chat; a SQuAD row of the same answers keeps the official rule."""
    monkeypatch.setattr(scores, "generate_answers", lambda model, tokenizer, prompts, **_: ["+"] * len(prompts))
    signs = [("x-trained", "+"), ("y-trained", "-"), ("z-untrained", "-")]
    rows = [{"id": name, "prompt": "sign?", "completion": sign} for name, sign in signs]
    result = evaluate_model(model, make_tokenizer(), load_jsonl(tmp_path, *rows), SETTINGS)
    assert result.exact_match == result.f1 == pytest.approx(100 / 3)
    assert [p.exact_match for p in result.predictions] == [100, 0, 0]
    groups = by_phrasing(result.predictions)
    assert (groups["trained"]["exact_match"], groups["untrained"]["f1"]) == (50, 0)
    asked, answered = {"role": "user", "content": "sign?"}, {"role": "assistant", "content": "-"}
    chat = load_jsonl(tmp_path, {"messages": [asked, answered]})
    assert evaluate_model(model, make_tokenizer(), chat, SETTINGS).exact_match == 0
    squad_row = {"id": "q", "context": "1 - 1", "question": "sign?", "answers": {"text": ["-"], "answer_start": [2]}}
    assert evaluate_model(model, make_tokenizer(), load_jsonl(tmp_path, squad_row), SETTINGS).exact_match == 100

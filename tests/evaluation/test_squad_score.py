"""The score against the official script's functions, copied, on random answers; and the means."""

import collections
import random
import re
import string

import pytest

from qlora_lite.evaluation.squad_score import Scores, aggregate, normalize_answer, score

# --- from the official evaluate-v2.0.py (Rajpurkar et al., MIT), unchanged but for formatting


def official_normalize(s):
    def remove_articles(text):
        regex = re.compile(r"\b(a|an|the)\b", re.UNICODE)
        return re.sub(regex, " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    def lower(text):
        return text.lower()

    return white_space_fix(remove_articles(remove_punc(lower(s))))


def official_tokens(s):
    return official_normalize(s).split() if s else []


def official_exact(a_gold, a_pred):
    return int(official_normalize(a_gold) == official_normalize(a_pred))


def official_f1(a_gold, a_pred):
    gold_toks = official_tokens(a_gold)
    pred_toks = official_tokens(a_pred)
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def official_score(prediction, golds):
    gold_answers = [gold for gold in golds if official_normalize(gold)] or [""]
    return max(official_exact(a, prediction) for a in gold_answers), max(
        official_f1(a, prediction) for a in gold_answers
    )


PIECES = [
    "the",
    "a",
    "An",
    "Nile",
    "river",
    "1,000",
    "—",
    "-",
    "'s",
    "U.S.",
    "Ä",
    "ﬁn",
    "\u00a0",
    "\n",
    "!",
    "theory",
    "İ",
]


def test_scores_equal_the_official_functions_on_random_answers():
    chance = random.Random(0)

    def text():
        return chance.choice(["", " "]).join(chance.choices(PIECES, k=chance.randrange(5)))

    for _ in range(3000):
        prediction, golds = text(), tuple(text() for _ in range(chance.randrange(4)))
        assert normalize_answer(prediction) == official_normalize(prediction)
        found = score(prediction, golds, no_answer_text="unanswerable")
        assert found == pytest.approx(official_score(prediction, golds), abs=1e-12), (prediction, golds)


def test_saying_there_is_no_answer_is_the_empty_answer():
    assert score("  UNANSWERABLE ", (), no_answer_text="unanswerable") == (1.0, 1.0)
    assert score("no answer", (), no_answer_text="the no-answer") == (0.0, 0.0)
    assert score("noanswer", (), no_answer_text="the no-answer") == (1.0, 1.0)


def test_a_gold_answer_that_is_the_no_answer_text_is_an_ordinary_answer():
    assert score("unanswerable", ("unanswerable",), no_answer_text="unanswerable") == (1.0, 1.0)


def test_the_mean_is_in_percent():
    assert aggregate([(1.0, 1.0), (0.0, 0.5), (0.0, 0.0), (1.0, 1.0)]) == Scores(50.0, 62.5, 4)
    assert aggregate(iter([(1.0, 1.0)])) == Scores(100.0, 100.0, 1)
    with pytest.raises(ValueError, match="no predictions"):
        aggregate([])


@pytest.mark.parametrize("gold", ["+", "-", "the", "?", "。", "!=", "A", "...", "-- -"])
def test_an_answer_of_which_squads_rule_leaves_nothing_is_compared_as_it_is_in_rows_of_other_formats(gold):
    def as_written(prediction):
        return score(prediction, (gold,), no_answer_text="none", is_squad=False)

    assert as_written(gold) == as_written(f" {gold}\n") == (1, 1)
    for wrong in {"*", "", "none", "an", gold * 2} - {gold}:
        assert as_written(wrong) == (0, 0)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("-5", ["-5.", "(-5)", "the -5"], ["5", "+5", "--"]),
        ("+1", ["+1"], ["1", "-1"]),
        ("1.5", ["1.5.", "1.5!"], ["15", "1,5", "1 5"]),
        (".5", [".5"], ["5"]),
        ("1,000", ["1000", "1,000."], ["1.000", "1"]),
        ("3:15", ["3:15"], ["315"]),
        ("C++", ["c++"], ["C", "C#"]),
        ("a + b", ["+ b"], ["b", "b +"]),
        ("50%", ["50%"], ["50"]),
        ("well-known", ["wellknown", "Well-known."], ["known"]),
        ("x, y", ["x y", "x, y."], ["xy"]),
    ],
)
def test_signs_that_make_a_number_or_a_symbol_another_one_count_in_rows_of_other_formats(gold, right, wrong):
    def exact(prediction):
        return score(prediction, (gold,), no_answer_text="none", is_squad=False)[0]

    assert [exact(prediction) for prediction in right] == [1.0] * len(right)
    assert [exact(prediction) for prediction in wrong] == [0.0] * len(wrong)


def test_squad_rows_keep_the_official_rule_for_such_answers():
    assert score("+", ("-",), no_answer_text="none") == (1, 1)
    assert score("The Nile.", ("nile",), no_answer_text="none", is_squad=False) == (1, 1)
    assert score("-", ("+", "plus"), no_answer_text="none", is_squad=False) == (0, 0)
    assert score("Plus!", ("+", "plus"), no_answer_text="none", is_squad=False) == (1, 1)

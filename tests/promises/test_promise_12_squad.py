"""Promise 12: EM and F1 agree with the official SQuAD rules. Values worked out by hand from `evaluate-v2.0.py`."""

import pytest

from qlora_lite.evaluation.squad_score import score

OFFICIAL = [
    # prediction, golds, exact match, F1
    ("Denver Broncos", ("Denver Broncos",), 1, 1),
    ("the denver broncos!", ("Denver Broncos",), 1, 1),  # case, article, punctuation
    ("Broncos", ("Denver Broncos",), 0, 2 / 3),  # precision 1, recall 1/2
    ("Broncos of Denver, Colorado", ("Denver Broncos",), 0, 2 * (2 / 4) * (2 / 2) / (2 / 4 + 1)),
    ("a b b", ("b b c",), 0, 0.8),  # "a" is an article; two of "b b" and of "b b c" are shared: precision 1, recall 2/3
    ("Santa Clara", ("Levi's Stadium", "Santa Clara, California"), 0, 0.8),  # the best gold counts
    ("1,000", ("1000",), 1, 1),  # punctuation goes, nothing takes its place
    ("well-known", ("well known",), 0, 0),  # so "wellknown" is not "well known"
    ("10–5", ("105",), 0, 0),  # an en dash is no ASCII punctuation
    ("Äpfel", ("äpfel",), 1, 1),
    ("an  apple\n a day", ("apple day",), 1, 1),
    ("theatre", ("atre",), 0, 0),  # articles are whole words
    ("", ("Nile",), 0, 0),
    ("the", ("Nile",), 0, 0),  # nothing is left of the prediction
    ("The", ("the",), 1, 1),  # nothing is left of either
    ("", (), 1, 1),
    ("unanswerable", (), 1, 1),
    ("Unanswerable.", (), 1, 1),
    ("Nile", (), 0, 0),
    ("unanswerable", ("Nile",), 0, 0),
    ("not unanswerable", (), 0, 0),  # no partial credit where there is no answer
]


@pytest.mark.parametrize(("prediction", "golds", "exact_match", "f1"), OFFICIAL)
def test_em_and_f1_agree_with_the_official_squad_rules(prediction, golds, exact_match, f1):
    assert score(prediction, golds, no_answer_text="unanswerable") == (exact_match, pytest.approx(f1, abs=1e-12))

"""Exact match and F1 by the rules of the official SQuAD v2.0 script, which scores v1.1 files as well.

In: a prediction and its gold answers. Out: (exact match, F1), each 0 to 1, the best over the golds; `aggregate` gives percentages.
Sources: SQuAD arXiv 1606.05250 section 6.1, arXiv 1806.03822, and their scripts `evaluate-v1.1.py` and `evaluate-v2.0.py`.
Surprising: if normalization empties a gold answer ("The"), F1 is 1 when the prediction is empty too; the v1.1 script gives 0 there,
although it grants the exact match. Only ASCII punctuation is removed, as in both scripts.

SQuAD has no answers like "+", "-5", "1.5" or "C++", so its rule treats "-5" as "5", "1.5" as "15" and "+" as "-". Rows of other formats
have such answers. For them, signs that distinguish numbers or symbols stay, and a gold answer that would become empty is compared
unchanged. Only `score` decides this.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SYMBOLS = "+#%*/=<>^"  # symbols that are not punctuation of a sentence
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # 1,000 is 1000
# A sign before a number, and points between digits: each becomes a private-use character and so is kept.
_SIGN, _POINT = re.compile(r"(?<![\w)])-(?=\.?\d)"), re.compile(r"(?<=\d)[.,:](?=\d)|(?<!\w)\.(?=\d)")
_KEPT = str.maketrans({"-": "\ue000", ".": "\ue001", ",": "\ue002", ":": "\ue003"})
_SENTENCE = str.maketrans("", "", "".join(set(string.punctuation) - set(_SYMBOLS)))


@dataclass(frozen=True)
class Scores:
    """Means over examples, 0 to 100."""

    exact_match: float
    f1: float
    num_examples: int


def score(
    prediction: str, golds: tuple[str, ...], *, no_answer_text: str, is_squad: bool = True
) -> tuple[float, float]:
    """-> (exact match, 0.0 or 1.0; F1, 0 to 1), the best over the gold answers.

    Without golds the question has no answer: only an empty prediction or `no_answer_text` (compared after normalization) is right; exact
    match and F1 are both 1 or both 0. The official rule ignores a gold answer that normalization empties. Without `is_squad`, signs that
    distinguish numbers or symbols stay (`normalize_with_signs`); a gold answer that is still empty is compared character by character,
    without outer white space, and F1 equals the exact match.
    """
    if not is_squad:
        pairs = [_score_as_written(prediction, gold) for gold in golds]
        return max(exact for exact, _ in pairs), max(f1 for _, f1 in pairs)
    golds = tuple(gold for gold in golds if normalize_answer(gold))
    if not golds:
        says_nothing = normalize_answer(prediction) in ("", normalize_answer(no_answer_text))
        return float(says_nothing), float(says_nothing)
    return max(_exact(prediction, gold) for gold in golds), max(_f1(prediction, gold) for gold in golds)


def aggregate(scores: Iterable[tuple[float, float]]) -> Scores:
    """Mean of the pairs from `score`, times 100. Raises ValueError without pairs."""
    pairs = list(scores)
    if not pairs:
        raise ValueError("no predictions to score")
    exact = math.fsum(pair[0] for pair in pairs)
    f1 = math.fsum(pair[1] for pair in pairs)
    return Scores(exact_match=100 * exact / len(pairs), f1=100 * f1 / len(pairs), num_examples=len(pairs))


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a, an, the; single spaces. In this order, as in the official script."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalize_with_signs(text: str) -> str:
    """Like `normalize_answer`, but +, #, %, *, /, =, <, > and ^ stay, and a minus before a number, and points and colons between digits."""
    text = _THOUSANDS.sub("", text.lower())
    for pattern in (_SIGN, _POINT):
        text = pattern.sub(lambda match: match[0].translate(_KEPT), text)
    return " ".join(_ARTICLES.sub(" ", text.translate(_SENTENCE)).split())


def _score_as_written(prediction: str, gold: str) -> tuple[float, float]:
    if normalize_with_signs(gold):
        return _exact(prediction, gold, normalize_with_signs), _f1(prediction, gold, normalize_with_signs)
    return (float(prediction.strip() == gold.strip()),) * 2


def _exact(prediction: str, gold: str, normalize: Callable[[str], str] = normalize_answer) -> float:
    return float(normalize(prediction) == normalize(gold))


def _f1(prediction: str, gold: str, normalize: Callable[[str], str] = normalize_answer) -> float:
    """Harmonic mean of precision and recall over words, counted with multiplicity; `gold` has at least one word."""
    predicted, wanted = normalize(prediction).split(), normalize(gold).split()
    common = (Counter(predicted) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)

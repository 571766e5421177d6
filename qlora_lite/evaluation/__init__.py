"""Evaluate: a model and held-out examples -> `EvalResult`: exact match, F1, loss, and every prediction.

scores.py        answers, their scores, and the loss
generate.py      batched greedy answers
squad_score.py   exact match and F1 by the official SQuAD rules
held_out.py      the choice of rows that are scored
"""

from qlora_lite.evaluation.generate import BATCH_TOKENS, answer_tokenizer, stream_answer
from qlora_lite.evaluation.scores import (
    EvalResult,
    EvalSettings,
    Prediction,
    by_phrasing,
    evaluate_model,
    validation_loss,
)
from qlora_lite.evaluation.squad_score import Scores, score

__all__ = [
    "BATCH_TOKENS",
    "EvalResult",
    "EvalSettings",
    "Prediction",
    "Scores",
    "answer_tokenizer",
    "by_phrasing",
    "evaluate_model",
    "score",
    "stream_answer",
    "validation_loss",
]

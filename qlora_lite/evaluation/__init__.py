"""Evaluate: a model and held-out examples -> `EvalResult`: exact match, F1, loss, and every prediction.

squad_score.py   the official rules      generate.py   batched greedy answers      scores.py   both, and the loss
"""

from qlora_lite.evaluation.generate import BATCH_TOKENS, answer_tokenizer, stream_answer
from qlora_lite.evaluation.scores import EvalResult, Prediction, by_phrasing, evaluate_model, validation_loss
from qlora_lite.evaluation.squad_score import Scores, score

__all__ = [
    "BATCH_TOKENS",
    "EvalResult",
    "Prediction",
    "Scores",
    "answer_tokenizer",
    "by_phrasing",
    "evaluate_model",
    "score",
    "stream_answer",
    "validation_loss",
]

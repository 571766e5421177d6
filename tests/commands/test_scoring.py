"""Scores before and after training, without a model: the answers of the base beside those of the tuned model."""

from types import SimpleNamespace
from typing import Any

import pytest

from qlora_lite.commands import scoring
from qlora_lite.evaluation.scores import EvalResult, Prediction


def predictions(*named: tuple[str, str, str]) -> tuple[Prediction, ...]:
    return tuple(Prediction(name, question, answer, ("x",), 0.0, 0.0) for name, question, answer in named)


def test_two_rows_of_one_id_keep_their_own_answers_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("7", "a?"), ("7", "b?"), ("7", "a?"), ("8", "a?"), ("7", "a?")]
    before = [
        {"id": name, "question": question, "base_prediction": f"before {i}"} for i, (name, question) in enumerate(rows)
    ]
    after = predictions(
        *((name, question, f"after {i}") for i, (name, question) in enumerate(rows)), ("9", "new?", "after 5")
    )
    written: list[dict[str, Any]] = []
    run: Any = SimpleNamespace(
        write_json=lambda name, facts: None,
        read_predictions=lambda: before,
        write_predictions=lambda lines: written.extend(lines),
    )
    monkeypatch.setattr(scoring, "score", lambda *args, **more: EvalResult(0.0, 0.0, 1.0, len(after), after))
    monkeypatch.setattr(scoring.show, "show_scores", lambda *args, **more: None)
    plan: Any = None
    scoring.score_after(plan, plan, run, scoring.Scored({"before": None, "after": None, "groups": {}}, []), {})
    joined = [(line["prediction"], line["base_prediction"]) for line in written]
    assert joined == [*((f"after {i}", f"before {i}") for i in range(5)), ("after 5", None)]

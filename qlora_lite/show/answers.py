"""Questions with the answers of the base and of the tuned model side by side, and the answers that count as right.

The page shows the first rows of the file, not selected by quality, and a few more on request.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_lite.show.lenient import number
from qlora_lite.show.page import Html, details, heading, html, join, note
from qlora_lite.show.text import safe_text

NUM_SHOWN, NUM_ON_REQUEST = 6, 14
LONGEST = 700  # characters of one text


def answers_side_by_side(predictions: Sequence[Mapping[str, Any]]) -> Html:
    """`predictions.jsonl`: question, prediction, gold, exact_match, f1 and, where recorded, base_prediction."""
    if not predictions:
        return Html()
    first, more = predictions[:NUM_SHOWN], predictions[NUM_SHOWN : NUM_SHOWN + NUM_ON_REQUEST]
    count = f"The first {len(first)} of {len(predictions)} questions" if more else f"All {len(first)} questions"
    return join(
        [
            heading("Answers side by side"),
            note(f"{count} in file order, good and bad."),
            _list(first),
            details(f"{len(more)} more", _list(more, start=1 + len(first))) if more else "",
        ]
    )


def _list(predictions: Sequence[Mapping[str, Any]], *, start: int = 1) -> Html:
    items = join(_answer(prediction) for prediction in predictions)
    return Html(f'<ol class="answers" start="{start}">{items}</ol>')


def _answer(prediction: Mapping[str, Any]) -> Html:
    columns = [_column("tuned model (after)", prediction.get("prediction"), _verdict(prediction))]
    if prediction.get("base_prediction") is not None:
        columns.insert(0, _column("base model (before)", prediction["base_prediction"]))
    columns.append(_column("accepted answers", _gold(prediction)))
    question = Html(f'<p class="question">{_shortened(prediction.get("question", ""))}</p>')
    return Html(f"<li>{question}<dl>{join(columns)}</dl></li>")


def _column(name: str, answer: Any, verdict: str = "") -> Html:
    return Html(f"<div><dt>{html(name)} {verdict}</dt><dd>{_shortened(answer) or '<i>(nothing)</i>'}</dd></div>")


def _verdict(prediction: Mapping[str, Any]) -> str:
    """Right, partly right with its F1, or wrong: in words and in colour."""
    exact, f1 = number(prediction.get("exact_match")), number(prediction.get("f1"))
    if exact is None and f1 is None:
        return ""
    if exact:
        return '<span class="verdict good">right</span>'
    return (
        f'<span class="verdict some">partly right, F1 {f1:.0f}</span>'
        if f1
        else '<span class="verdict bad">wrong</span>'
    )


def _gold(prediction: Mapping[str, Any]) -> str:
    gold = prediction.get("gold")
    texts = [str(text) for text in gold] if isinstance(gold, list) else [str(gold or "")]
    return " | ".join(dict.fromkeys(texts)) or "no answer in the passage"


def _shortened(text: Any) -> Html:
    words = safe_text(text).strip()
    return html(words if len(words) <= LONGEST else f"{words[:LONGEST]} …")

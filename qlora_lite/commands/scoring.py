"""Score a loaded model on held-out rows, shown: the step that train, eval, merge, rank and mix share."""

from pathlib import Path

from qlora_lite import api, show
from qlora_lite.evaluation import EvalResult
from qlora_lite.plan import Plan


def score(
    plan: Plan,
    loaded: api.LoadedModel,
    title: str,
    *,
    data: Path | None = None,
    spent: dict[str, float] | None = None,
) -> EvalResult:
    """Exact match, F1 and loss on the plan's held-out rows, or those of `data`."""
    with show.phase(title, spent=spent) as phase:
        result = api.evaluate(plan, loaded, data=data, progress=phase.progress)
        phase.note(_in_words(result))
    for sentence in result.account:
        show.say_warning(sentence)
    return result


def _in_words(result: EvalResult) -> str:
    if result.exact_match is None or result.f1 is None:
        return (
            f"loss {result.loss:.3f}, {result.num_examples} texts; exact match and F1 need answers, plain text has none"
        )
    return f"exact match {result.exact_match:.1f}, F1 {result.f1:.1f}, {result.num_examples} questions"

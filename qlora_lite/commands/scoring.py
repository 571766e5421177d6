"""Score a loaded model on held-out rows and show it: for every verb that scores, and for `train` before and after training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.errors import RunError
from qlora_lite.evaluation import EvalResult, by_phrasing
from qlora_lite.plan import Plan
from qlora_lite.runs.folder import RunDir


@dataclass(frozen=True)
class Scored:
    """Scores and answers of a run before training, in the form of eval.json and predictions.jsonl."""

    scores: dict[str, Any]  # before, after, groups
    answers: list[dict[str, Any]]

    def keep(self, run: RunDir) -> None:
        """Write both if there are scores: the answers first, because a run with eval.json does not answer again."""
        if self.scores["before"] is not None:
            run.write_predictions(self.answers)
            run.write_json("eval.json", self.scores)


def score(
    plan: Plan,
    loaded: api.LoadedModel,
    title: str,
    *,
    data: Path | None = None,
    spent: dict[str, float] | None = None,
) -> EvalResult:
    """Compute and show exact match, F1 and loss on the plan's held-out rows, or on those of `data`."""
    with show.phase(title, spent=spent) as phase:
        result = api.evaluate(plan, loaded, data=data, progress=phase.progress)
        phase.note(_in_words(result))
    for sentence in result.account:
        show.say_warning(sentence)
    return result


def _in_words(result: EvalResult) -> str:
    if result.exact_match is None or result.f1 is None:
        return f"loss {result.loss:.3f}, {result.num_examples} texts; exact match and F1 need answers, which plain text lacks"
    return f"exact match {result.exact_match:.1f}, F1 {result.f1:.1f}, {result.num_examples} questions"


def score_before(plan: Plan, loaded: api.LoadedModel, run: RunDir, spent: dict[str, float]) -> Scored:
    """Score the model before training, or read a resumed run's scores from its records. Raises RunError."""
    scores = {key: value for key, value in run.read_json("eval.json").items() if key != "schema_version"}
    if scores or plan.recipe.data.eval is None:
        scores = {"before": None, "after": None, "groups": {}} | scores
        if not all(isinstance(scores[key], dict | None) for key in ("before", "after", "groups")):
            raise RunError(
                f"{run.path / 'eval.json'}: damaged (not scores). Remove it and rerun the command that writes it"
            )
        return Scored(scores, run.read_predictions())
    start = "base model" if plan.recipe.lora.init_from is None else "adapter that training starts from"
    result = score(plan, loaded, f"scoring the {start}", spent=spent)
    groups = {name: {"before": group, "after": {}} for name, group in by_phrasing(result.predictions).items()}
    answers = [
        {"id": answer.id, "question": answer.question, "gold": answer.gold, "base_prediction": answer.prediction}
        for answer in result.predictions
    ]
    return Scored({"before": result.to_json_dict(), "after": None, "groups": groups}, answers)


def score_after(
    plan: Plan, loaded: api.LoadedModel, run: RunDir, before: Scored, spent: dict[str, float]
) -> dict[str, Any]:
    """Score the tuned model; show and store scores and answers beside those before training."""
    scores = before.scores
    result = score(plan, loaded, "scoring the tuned model", spent=spent)
    groups = {
        name: {"before": scores["groups"].get(name, {}).get("before", {}), "after": group}
        for name, group in by_phrasing(result.predictions).items()
    }
    scores = scores | {"after": result.to_json_dict(), "groups": groups}
    run.write_json("eval.json", scores)
    base_answers = _answers_in_turn(run.read_predictions())
    run.write_predictions(
        asdict(answer) | {"base_prediction": next(base_answers.get((answer.id, answer.question), iter(())), None)}
        for answer in result.predictions
    )
    shown = {f"{name} phrasing": group for name, group in groups.items()}
    show.show_scores(scores["before"], scores["after"], groups=shown)
    return scores


def _answers_in_turn(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, Any], Iterator[Any]]:
    """Map (id, question) to the base's answers in order: several rows may have one id, and one row several examples."""
    answers: dict[tuple[str, Any], list[Any]] = {}
    for line in lines:
        answers.setdefault((line["id"], line.get("question")), []).append(line.get("base_prediction"))
    return {key: iter(in_turn) for key, in_turn in answers.items()}

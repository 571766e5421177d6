"""The verb `ask`: one question, answered by one model of a run or by all, side by side."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.data.prompts import question_prompt
from qlora_lite.errors import UserError
from qlora_lite.evaluation import answer_tokenizer, stream_answer
from qlora_lite.files.text_file import NotText, decode_file
from qlora_lite.limits import TEXT_CHARS
from qlora_lite.plan import Plan

_CONTEXT_BYTES = 4 * TEXT_CHARS  # a character has at most four


@dataclass(frozen=True)
class Answers:
    """The answers to one question."""

    answers: dict[str, str | None]  # by name of the model; None for a model that does not exist

    def to_json_dict(self) -> dict[str, Any]:
        return asdict(self)


def ask(run_dir: Path, question: str, *, context: Path | None, which: str, base: Path | None = None) -> Answers:
    """Stream an answer with the training template, from one model of the run or from all, side by side."""
    passage = read_context(context)
    wanted = list(api.WHICH) if which == "all" else [api.model_of_run(which)]
    run, plan = api.open_run(run_dir, base=base)
    is_there = {name: not (which == "all" and name == "merged") or run.merged.is_dir() for name in wanted}
    answers: dict[str, str | None] = dict.fromkeys(wanted)
    models = api.run_models(plan, run, [name for name in wanted if is_there[name]])
    for name in [name for name in wanted if is_there[name]]:
        with show.phase(f"loading the {name} model"):
            loaded = next(models)
        answers[name] = answer(plan, loaded, name, question, passage)
    if which == "all":
        show.show_answers(answers, question=question)
    return Answers(answers)


def answer(plan: Plan, loaded: api.LoadedModel, name: str, question: str, passage: str | None) -> str:
    """Stream the answer of one model to the screen, with the template of training."""
    template = api.template_of(plan, loaded.tokenizer)
    prompt, stop_token = question_prompt(template, question, passage, format=plan.recipe.data.format)
    pieces = stream_answer(
        loaded.model,
        answer_tokenizer(loaded.tokenizer, template),
        prompt,
        stop_token=stop_token,
        max_new_tokens=plan.recipe.eval.max_new_tokens,
    )
    return show.stream_answer(name, pieces).strip()


def read_context(path: Path | None) -> str | None:
    """Read the passage from a text file. Raises UserError."""
    if path is None:
        return None
    advice = "Give --context a text file with the passage"
    try:
        with path.open("rb") as file:
            text, note = decode_file(file.read(_CONTEXT_BYTES + 1), longest=_CONTEXT_BYTES)
    except OSError as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error}). {advice}") from error
    except NotText as error:
        raise UserError(f"{path}: not readable as UTF-8 text: line {error.line}: {error}. {advice}") from error
    if note:
        show.say(f"{path}: {note}")
    return text.strip()

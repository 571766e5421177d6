"""The opening of a run's report: the model and method, its scores, its cost; in words, then in a few numbers."""

from collections.abc import Mapping
from typing import Any

from qlora_lite.show import rows
from qlora_lite.show.lenient import dig, is_number, mapping, number
from qlora_lite.show.page import Figure, Html, figures, join, paragraph
from qlora_lite.show.rows import METHODS
from qlora_lite.show.run_files import Run
from qlora_lite.show.sections import own_method
from qlora_lite.units import format_seconds

_HOW = {
    "qlora": "QLoRA: the base model is stored in 4 bits per parameter and stays frozen; only a small addition, the adapter, is trained",
    "lora": "LoRA: the base model is stored in 16 bits per parameter and stays frozen; only a small addition, the adapter, is trained",
    "full": "full fine-tuning: every parameter of the model is trained",
    "full_8bit": "full fine-tuning: every parameter of the model is trained, with a small optimizer state",
}  # fmt: skip


def summary(run: Run) -> Html:
    """The paragraphs and figures; those without data (yet) are omitted."""
    entries = [_answers(run.scores), _memory(run), _time(run.train), _adapter(run)]
    shown = figures([entry for entry in entries if entry is not None])
    sentences = join([paragraph(_method(run)), paragraph(_score(run.scores))])
    return join([sentences, shown]) if sentences or shown else paragraph("This run has no results yet.")


def title(run: Run) -> str:
    """The model and the method; the folder's name for a run without a plan (yet)."""
    model, method = _model(run), own_method(run.plan)
    how = f" with {METHODS[method][0]}" if method in ("qlora", "lora") else " in full"
    return f"{model}, fine-tuned{how}" if model else f"Run {run.name}"


def _model(run: Run) -> str:
    return str(run.plan.get("model") or dig(run.plan, "settings", "model", "base") or "")


def _method(run: Run) -> str:
    model = _model(run)
    if not model:
        return ""
    seen = sum(step["num_examples"] for step in run.steps if is_number(step.get("num_examples")))
    examples = f" on {seen:,} examples in {len(run.steps):,} steps" if seen else ""
    return (
        f"{model} is a language model: given a text, it continues it, piece by piece. Here it was trained further{examples}, "
        f"which is called fine-tuning. The method is {_HOW.get(own_method(run.plan), own_method(run.plan))}."
    )


def _score(scores: Mapping[str, Any]) -> str:
    """One sentence: the score that a newcomer understands best, before and after."""
    before, after = mapping(scores.get("before")), mapping(scores.get("after"))
    asked, now, then = (
        number(value) for value in (after.get("num_examples"), after.get("exact_match"), before.get("exact_match"))
    )
    loss_then, loss_now = number(before.get("loss")), number(after.get("loss"))
    if now is not None:
        earlier = f"; before training it was {then:.1f}%" if then is not None else ""
        count = f"{asked:,.0f} " if asked else ""
        return f"Of {count}test questions held out of training, it now answers {now:.1f}% word for word right{earlier}."
    if loss_now is None:
        return ""
    earlier = f", {loss_then:.3f} before training" if loss_then is not None else ""
    return f"Its loss on test texts held out of training is {loss_now:.3f}{earlier}; the loss measures how unlikely it finds them."


def _answers(scores: Mapping[str, Any]) -> Figure | None:
    before, after = mapping(scores.get("before")), mapping(scores.get("after"))
    for key, label, form in (("exact_match", "Right answers", "{:.1f}%"), ("loss", "Loss", "{:.3f}")):
        then, now = number(before.get(key)), number(after.get(key))
        if now is not None:
            value = form.format(now) if then is None else f"{form.format(then)} to {form.format(now)}"
            return Figure(
                label, value, "word for word right, before and after" if key == "exact_match" else "lower is better"
            )
    return None


def _memory(run: Run) -> Figure | None:
    """The measured peak, else the planned one, against the plan of full fine-tuning."""
    peaks = mapping(run.memory.get("peak_bytes")) or mapping(run.train.get("peak_bytes"))
    measured, planned = number(peaks.get("measured")), number(peaks.get("planned"))
    own = number(dig(run.plan, "methods", own_method(run.plan), "peak_bytes"))
    peak, full = measured or planned or own, number(dig(run.plan, "methods", "full", "peak_bytes"))
    if not peak:
        return None
    saved = rows.savings(peak, full)
    how = "measured" if measured else "planned"
    return Figure("Peak memory", rows.size(peak), f"{how}; saves {saved} against full fine-tuning" if saved else how)


def _time(train: Mapping[str, Any]) -> Figure | None:
    wall_s, train_s = number(train.get("wall_s")), number(train.get("train_s"))
    if not wall_s:
        return None
    return Figure("Time", format_seconds(wall_s), f"{format_seconds(train_s)} of it training" if train_s else "total")


def _adapter(run: Run) -> Figure | None:
    """The size of the adapter, against a copy of the whole model."""
    disk, full = dict(run.disk), number(dig(run.plan, "checkpoint_bytes", "full"))
    size = disk.get("adapter/")
    if not size:
        return None
    return Figure("Adapter on disk", rows.size(size), f"the whole model would take {rows.size(full)}" if full else "")

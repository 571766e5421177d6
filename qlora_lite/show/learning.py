"""The training of a run: its loss as a curve and in numbers, its learning rate and gradient norm, and its pace.

in    the lines of steps.jsonl: step, loss, eval_loss, learning_rate, grad_norm, step_s, num_examples, num_label_tokens
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_lite.show import rows
from qlora_lite.show.curves import Line, Points, running_mean, sampled, svg_curve
from qlora_lite.show.lenient import is_number
from qlora_lite.show.page import Html, details, drawing, join, note, paragraph, table
from qlora_lite.units import format_seconds

SMOOTH_STEPS = 10
NUM_IN_TABLE = 12  # steps in the table of a curve


def learning(steps: Sequence[Mapping[str, Any]]) -> Html:
    """The section; empty for fewer than two steps."""
    return join([_loss(steps), _pace(steps), _optimizer_curves(steps)])


def _loss(steps: Sequence[Mapping[str, Any]]) -> Html:
    """Each step's loss as a thin line, the running mean as a thick one, and the validation loss where it was measured."""
    losses, validation = _points(steps, "loss"), _points(steps, "eval_loss")
    if len(losses) < 2:
        return Html()
    means = running_mean(losses, SMOOTH_STEPS)
    lines = [
        Line(losses, "each"),
        Line(means, "mean"),
        *([Line(validation, "eval", has_dots=True)] if validation else []),
    ]
    (first, begin), (last, end) = means[0], means[-1]
    label = f"training loss from step {first} to step {last}: {begin:.3f} to {end:.3f}"
    return join(
        [
            paragraph(
                "Training proceeds in steps: the model answers a few examples, and its trainable parameters move slightly towards",
                "the right answers. The loss measures how unlikely the model found these answers; a falling curve shows learning.",
            ),
            drawing(svg_curve(lines, label=label), _legend(end, validation)),
            details("loss values", _loss_table(losses, means, validation)),
        ]
    )  # fmt: skip


def _legend(end: float, validation: Points) -> str:
    words = f"Thin: the loss of each step. Thick: the mean of the last {SMOOTH_STEPS} steps, {end:.3f} at the end."
    if validation:
        best_step, best = min(validation, key=lambda point: point[1])
        words += (
            f" Dots: validation loss, on examples not used for training; lowest {best:.3f} after step {best_step:g}, "
            f"{validation[-1][1]:.3f} at the end."
        )
    return words


def _loss_table(losses: Points, means: Points, validation: Points) -> Html:
    loss, held_out = dict(losses), dict(validation)
    lines = [
        (f"{step:g}", f"{loss[step]:.3f}", f"{mean:.3f}", rows.decimal(held_out.get(step), 3))
        for step, mean in sorted({*sampled(means, NUM_IN_TABLE), *(point for point in means if point[0] in held_out)})
    ]
    columns = ["step", "loss", f"mean of the last {SMOOTH_STEPS}", "validation loss"]
    return table("Loss at selected steps", columns, lines)


def _optimizer_curves(steps: Sequence[Mapping[str, Any]]) -> Html:
    """Learning rate and gradient norm, on request."""
    return details(
        "learning rate and gradient norm",
        join(
            [
                _curve(steps, "learning_rate", "Learning rate", "the size of an update"),
                _curve(steps, "grad_norm", "Gradient norm", "the size of the gradient before clipping"),
            ]
        ),
    )


def _curve(steps: Sequence[Mapping[str, Any]], key: str, name: str, meaning: str) -> Html:
    points = _points(steps, key)
    svg = svg_curve([Line(points, "mean")], label=f"{name} of each step", height=220)
    if not svg:
        return Html()
    lines = [(f"{step:g}", f"{value:.3g}") for step, value in sampled(points, NUM_IN_TABLE)]
    caption = f"{name} at selected steps"
    return join([drawing(svg, f"{name}: {meaning}."), table(caption, ["step", name.lower()], lines)])


def _points(steps: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of each step that has a finite value; a resumed run may record a step twice: the later line counts."""
    by_step = {step["step"]: step[key] for step in steps if is_number(step.get("step")) and is_number(step.get(key))}
    return sorted(by_step.items())


def _pace(steps: Sequence[Mapping[str, Any]]) -> Html:
    timed = [step for step in steps if is_number(step.get("step_s"))]
    busy_s = sum(step["step_s"] for step in timed)
    if not timed or busy_s <= 0:
        return Html()
    words = [f"{len(timed)} steps in {format_seconds(busy_s)}"]
    for key, unit in (("num_examples", "examples"), ("num_label_tokens", "trained tokens")):
        amount = sum(step[key] for step in timed if is_number(step.get(key)))
        words += [f"{amount / busy_s:.2f} {unit} a second"] if amount else []
    return note(", ".join(words) + ".")

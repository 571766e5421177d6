"""One page about a run: RUN_DIR/report.html, from the files that the run left there.

    in    eval.json, memory.json, plan.json, merge.json, env.json, steps.jsonl, predictions.jsonl, recipe.yaml; any may be missing
    out   one HTML file without scripts, fonts, images or links to anything outside it; light or dark as the reader's system is

Every text is escaped, and loses control characters first. A file that is damaged is named on the page instead of shown.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qlora_lite.errors import RunError
from qlora_lite.show.curves import Line, running_mean, svg_curve
from qlora_lite.show.tables import proof_rows, savings, score_rows
from qlora_lite.show.text import safe_text
from qlora_lite.units import format_bytes, format_seconds

NUM_PREDICTIONS = 20
SMOOTH_STEPS = 10
METHOD_NAMES = {
    "qlora": "QLoRA",
    "lora": "LoRA, 16-bit base",
    "full_8bit": "full, 8-bit optimizer",
    "full": "full fine-tuning",
}


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into `run_dir` and return its path. Raises RunError when there is no such folder or it cannot be written."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such run directory")
    path, staged = run_dir / "report.html", run_dir / ".report.html.part"
    try:
        staged.write_text(render_report(run_dir), encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def render_report(run_dir: Path) -> str:
    """The page as a string; sections whose file is missing are left out."""
    files = _RunFiles(run_dir)
    steps = files.lines("steps.jsonl")
    sections = [
        ("Scores", _scores(files.mapping("eval.json"))),
        ("Loss", _loss_curve(steps) + _pace(steps)),
        ("Learning rate and gradient norm", _optimizer_curves(steps)),
        ("Memory", _memory(files.mapping("memory.json"), files.mapping("plan.json"))),
        ("Proof of the merge", _proof(files.mapping("merge.json"))),
        ("Settings and why", _reasons(files.mapping("plan.json")) + _recipe(files.text("recipe.yaml"))),
        ("Sample predictions", _predictions(files.lines("predictions.jsonl"))),
        ("Made with", _pairs(files.mapping("env.json"))),
        ("Files that could not be read", "".join(f"<p>{_text(problem)}</p>" for problem in files.problems)),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    title = _text(run_dir.resolve().name)
    return _PAGE.replace("{title}", title).replace("{body}", body or "<p>This run has left no results yet.</p>")


class _RunFiles:
    """Reads files of a run directory; what is missing is empty, what is damaged is empty and remembered in `problems`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.problems: list[str] = []

    def text(self, name: str) -> str:
        try:
            return (self.run_dir / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            self._remember(f"{name}: {error}")
            return ""

    def mapping(self, name: str) -> dict[str, Any]:
        text = self.text(name)
        value = self._parse(name, text) if text else {}
        return value if isinstance(value, dict) else {}

    def lines(self, name: str) -> list[dict[str, Any]]:
        lines = self.text(name).splitlines()
        values = [self._parse(f"{name} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        return [value for value in values if isinstance(value, dict)]

    def _parse(self, where: str, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            self._remember(f"{where}: {error}")
            return None

    def _remember(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def _scores(scores: Mapping[str, Any]) -> str:
    before, after = _dict(scores.get("before")), _dict(scores.get("after"))
    rows = score_rows(_numbers(before), _numbers(after))
    for name, group in _dict(scores.get("groups")).items():
        before, after = _dict(_dict(group).get("before")), _dict(_dict(group).get("after"))
        for label, old, new, change in score_rows(_numbers(before), _numbers(after)):
            rows.append((f"{name}: {label}", old, new, change))
    return _table(["", "before", "after", "change"], rows) if rows else ""


def _loss_curve(steps: Sequence[Mapping[str, Any]]) -> str:
    """Each step's loss as a faint line, their running mean as a strong one, and the validation loss where it was measured."""
    losses, validation = _points(steps, "loss"), _points(steps, "eval_loss")
    if len(losses) < 2:
        return ""
    means = running_mean(losses, SMOOTH_STEPS)
    lines = [Line(losses, "each"), Line(means, "mean")]
    (first, begin), (last, end) = means[0], means[-1]
    label = f"training loss from step {first} to step {last}: {begin:.3f} to {end:.3f}"
    legend = f"each step, and the mean of the last {SMOOTH_STEPS} steps; at the end {end:.3f}"
    if validation:
        best_step, best = min(validation, key=lambda point: point[1])
        lines.append(Line(validation, "eval", has_dots=True))
        legend += (
            f". Dots: validation loss, lowest {best:.3f} after step {best_step}, at the end {validation[-1][1]:.3f}"
        )
    return svg_curve(lines, label=label) + f'<p class="note">{legend}</p>'


def _optimizer_curves(steps: Sequence[Mapping[str, Any]]) -> str:
    curves = ""
    for key, name in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm before clipping")):
        curve = svg_curve([Line(_points(steps, key), "mean")], label=f"{name} of each step", height=140)
        curves += f'<p class="note">{name}</p>{curve}' if curve else ""
    return curves


def _points(steps: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of each step that has a finite value; a resumed run may hold a step twice: the later line counts."""
    by_step = {step["step"]: step[key] for step in steps if _finite(step.get("step")) and _finite(step.get(key))}
    return sorted(by_step.items())


def _pace(steps: Sequence[Mapping[str, Any]]) -> str:
    timed = [step for step in steps if _finite(step.get("step_s"))]
    if not timed:
        return ""
    busy_s = sum(step["step_s"] for step in timed)
    words = [f"{len(timed)} steps in {format_seconds(busy_s)}"]
    for key, unit in (("num_examples", "examples/s"), ("num_label_tokens", "label tokens/s")):
        amount = sum(step[key] for step in timed if _finite(step.get(key)))
        if amount and busy_s > 0:
            words.append(f"{amount / busy_s:.2f} {unit}")
    return f'<p class="note">{", ".join(words)}</p>'


def _memory(memory: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """The table of `memory.json` (`columns`, `totals`) as the screen shows it, or else the plan's methods."""
    columns, totals = _dict(memory.get("columns")), _dict(memory.get("totals"))
    if not columns:
        methods = {METHOD_NAMES[key]: _dict(_dict(plan.get("methods")).get(key)) for key in METHOD_NAMES}
        columns = {f"{name}, planned": _dict(method.get("parts")) for name, method in methods.items() if method}
        totals = {f"{name}, planned": method.get("peak_bytes") for name, method in methods.items() if method}
    columns = {name: _dict(column) for name, column in columns.items()}
    totals = {name: total for name, total in totals.items() if _finite(total)}
    parts = list(dict.fromkeys(part for column in columns.values() for part in column))
    if not parts and not totals:
        return ""
    rows = [[_label(part), *(_size(column.get(part)) for column in columns.values())] for part in parts]
    rows.append(["total", *(_size(totals.get(name)) for name in columns)])
    saved = savings(totals, list(columns))
    return _table(["", *columns], rows, last_is_total=True) + (
        f'<p class="good">saves {_text(saved)}</p>' if saved else ""
    )


def _proof(merge: Mapping[str, Any]) -> str:
    rows = proof_rows(_numbers(merge))
    return _table(["", "value", "meaning"], rows) if rows else ""


def _reasons(plan: Mapping[str, Any]) -> str:
    reasons = plan.get("reasons")
    lines = [f"{key}: {value}" for key, value in reasons.items()] if isinstance(reasons, dict) else reasons
    items = "".join(f"<li>{_text(line)}</li>" for line in lines) if isinstance(lines, list) else ""
    return f"<ul>{items}</ul>" if items else ""


def _recipe(text: str) -> str:
    return f"<details><summary>the recipe, resolved</summary><pre>{_text(text)}</pre></details>" if text.strip() else ""


def _predictions(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first rows as a table; the columns are the keys of the first one, but for long and technical ones."""
    if not rows:
        return ""
    shown = rows[:NUM_PREDICTIONS]
    columns = [key for key in shown[0] if key not in ("id", "context")]
    table = _table([_label(key) for key in columns], [[_value(row.get(key)) for key in columns] for row in shown])
    return table + f'<p class="note">{len(shown)} of {len(rows)}</p>'


def _pairs(values: Mapping[str, Any]) -> str:
    rows = [(_label(key), _value(value)) for key, value in _flat(values).items() if key != "schema_version"]
    return _table(["", ""], rows) if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, last_is_total: bool = False) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in columns) if any(columns) else ""
    lines = [
        f"<tr{' class=total' if last_is_total and index == len(rows) - 1 else ''}>"
        + "".join(f"<td>{_text(value)}</td>" for value in row)
        + "</tr>"
        for index, row in enumerate(rows)
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " | ".join(_value(item) for item in value)
    return "–" if value is None else str(value)


def _size(value: Any) -> str:
    return format_bytes(value) if _finite(value) else "–"


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: value for key, value in values.items() if _finite(value)}


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_text: Callable[[object], str] = lambda value: escape(safe_text(value))  # noqa: E731

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #e3e7ee; --card: #fff; --page: #f5f7fa; --accent: #2f6fde; --eval: #b4570a; --good: #16794a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8f0; --soft: #94a0b4; --line: #2a3242; --card: #181e2a; --page: #10141d; --accent: #6ea3ff; --eval: #f0a060; --good: #5fd39b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1.5rem; } h1 small { color: var(--soft); font-size: 1rem; font-weight: 400; }
h2 { font-size: 1.05rem; margin: 0 0 .75rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.3rem; margin: 0 0 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; } tr:last-child td { border-bottom: 0; } tr.total td { font-weight: 650; border-top: 2px solid var(--line); }
.note { color: var(--soft); margin: .5rem 0 0; font-size: .9rem; } .good { color: var(--good); font-weight: 600; margin: .6rem 0 0; }
ul { margin: 0 0 .75rem; padding-left: 1.2rem; } summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; } .grid { stroke: var(--line); }
polyline { fill: none; stroke: var(--accent); stroke-linejoin: round; } .each { opacity: .35; } .mean { stroke-width: 2.5; }
polyline.eval { stroke: var(--eval); stroke-dasharray: 4 3; } circle.eval { fill: var(--eval); }
</style>
</head>
<body>
<h1>{title} <small>qlora_lite run</small></h1>
{body}
</body>
</html>
"""

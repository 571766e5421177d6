"""One page about a run: RUN_DIR/report.html, from the files that the run left there.

    in    the JSON files, logs and folders of a run (run_files.py); any may be missing
    out   one self-contained HTML file (page.py), written for someone who has never trained a model

A section whose file is missing is left out; a damaged file is named at the end of the page.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lite.errors import RunError
from qlora_lite.show import rows, sections
from qlora_lite.show.answers import answers_side_by_side
from qlora_lite.show.bars import REST, Bar, svg_bars
from qlora_lite.show.learning import learning
from qlora_lite.show.lenient import dig, mapping, mappings, number
from qlora_lite.show.page import (
    Html,
    Section,
    details,
    drawing,
    heading,
    html,
    join,
    note,
    paragraph,
    render_page,
    share_bar,
    table,
)
from qlora_lite.show.rows import SCORES
from qlora_lite.show.run_files import Run, read_run
from qlora_lite.show.sharing import sharing
from qlora_lite.show.spectra import spectra_section
from qlora_lite.show.summary import summary, title
from qlora_lite.show.timeline import layer_rows, svg_timeline

_PLANNED_AND_MEASURED = ["planned", "measured", "difference"]


def render_report(run_dir: Path) -> Html:
    """The page of the files that are there, the text of `report.html`. Raises RunError when there is no such folder."""
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such run directory")
    run = read_run(run_dir)
    body = [
        Section("answers", "How well it answers", join([_scores(run.scores), answers_side_by_side(run.predictions)])),
        Section("memory", "Memory", _memory(run)),
        Section("methods", "Compared with other methods", sections.methods_side_by_side(run.plan)),
        Section("sharing", "What was read once", sharing(run.plan)),
        Section("learning", "How it learned", learning(run.steps)),
        Section("rank", "What was learned, in how many directions", spectra_section(run.rank)),
        Section("time", "Time", _time(run)),
        Section("disk", "Disk", _disk(run)),
        Section("decisions", "Decisions and settings", join([sections.decisions(run.plan), _recipe(run.recipe)])),
        Section("proof", "Proof of the merge", _proof(run.merge)),
        Section("environment", "Environment", _environment(run.env)),
        Section("problems", "Files that could not be read", join(paragraph(problem) for problem in run.problems)),
    ]
    return render_page(title(run), kind=f"qlora_lite · report of the run {run.name}", lead=summary(run), sections=body)


def _scores(scores: Mapping[str, Any]) -> Html:
    """Before and after, with what each score means."""
    lines = rows.score_rows(mapping(scores.get("before")), mapping(scores.get("after")))
    found = [name for name, (label, _) in SCORES.items() if any(line[0] == label for line in lines)]
    lines += rows.group_rows(mapping(scores.get("groups")))
    return join(
        [
            sections.terms((SCORES[name][0], SCORES[name][1]) for name in found),
            table("Scores before and after the training", ["score", "before", "after", "change"], lines),
            join(note(sentence) for sentence in rows.left_out(scores)),
        ]
    )


def _memory(run: Run) -> Html:
    """The peak part by part, planned beside measured; the phases; one step by layer."""
    parts = _parts(run.memory, budget_bytes=number(run.plan.get("budget_bytes")))
    phases, layers = _phases(run.memory), _by_layer(mappings(run.memory.get("timeline")))
    taken = [mapping(dig(run.plan, "methods", key, "parts")) for key in mapping(run.plan.get("methods"))]
    meanings = sections.legend(sections.taken_parts(*taken, *_columns(run.memory).values()))
    return join(
        [
            parts,
            join([heading("What the parts are"), meanings]) if meanings else "",
            join([heading("Phases of a step"), phases]) if phases else "",
            join([heading("One step, layer by layer"), layers]) if layers else "",
            _asides(run.memory),
        ]
    )


def _parts(memory: Mapping[str, Any], *, budget_bytes: float | None) -> Html:
    lines = rows.part_rows(memory)
    if not lines:
        return Html()
    bars = [Bar(name, column, number(dig(memory, "peak_bytes", name))) for name, column in _columns(memory).items()]
    budget = number(memory.get("budget_bytes")) or budget_bytes
    return join(
        [
            paragraph(
                "Training takes far more memory than using a model. What counts is the peak: the moment of a step at which most is",
                "in use. It was planned part by part before the training, and measured during it.",
            ),
            drawing(svg_bars(bars, budget_bytes=budget), join(_caption(bars), by=" ")),
            table("Memory at the peak of a step", ["part", *_PLANNED_AND_MEASURED], sections.with_swatches(lines), last_is_total=True),
        ]
    )  # fmt: skip


def _caption(bars: Sequence[Bar]) -> list[str]:
    is_whole = all(kind != REST for bar in bars for kind, _ in bar.segments)
    said = "The numbers in the bars are those of the table. The budget is the memory that the training may use."
    return [said] if is_whole else [said, "The dashed piece is what could not be told apart."]


def _columns(memory: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`planned` and `measured`: the bytes of every part."""
    parts = mapping(memory.get("parts"))
    return {name: {key: mapping(part).get(name) for key, part in parts.items()} for name in ("planned", "measured")}


def _phases(memory: Mapping[str, Any]) -> Html:
    lines = [(sections.phase_with_meaning(name), *rest) for name, *rest in rows.phase_rows(memory)]
    phases = table("Highest memory in each phase of a step", ["phase", *_PLANNED_AND_MEASURED], lines)
    return join([phases, table("Beside the peaks", ["", ""], rows.beside_rows(memory))])


def _by_layer(timeline: Sequence[Mapping[str, Any]]) -> Html:
    """What is held when each layer ends: rising while the model reads, falling on the way back."""
    svg = svg_timeline(timeline)
    if not svg:
        return Html()
    phases, lines = layer_rows(timeline)
    numbers = table("Memory held when each layer ends, in each phase", ["layer", *phases], lines)
    caption = (
        "A model is a stack of layers. A column is the memory held when one of them ends, in the order of the step; "
        "what a layer needs only while it computes comes on top."
    )
    return join([drawing(svg, caption), details("these columns in numbers", numbers)])


def _asides(memory: Mapping[str, Any]) -> Html:
    """The whole process, and what had to be tried again."""
    rss = number(memory.get("rss_bytes"))
    words = f"The whole process, with Python and its libraries, took up to {rows.size(rss)} of the computer's memory."
    return join([note(words if rss else ""), *(note(f"Tried again: {retry}") for retry in rows.retries_of(memory))])


def _time(run: Run) -> Html:
    """Where the time went; without phases, training and the rest."""
    lines = [
        (name, shown, join([share, share_bar(float(share.removesuffix("%")))]))
        for name, shown, share in rows.time_rows(rows.phases_of(run.train), number(run.train.get("wall_s")))
    ]
    return table("Where the time went", ["phase", "time", "share"], lines, last_is_total=True)


def _disk(run: Run) -> Html:
    """What the folder holds, beside what checkpoints of other kinds would take."""
    held = [(name, _meaning_of_folder(name), size) for name, size in rows.disk_rows(run.disk)]
    columns = ["folder", "what it is", "size"]
    return join(
        [
            table("What this run's folder holds", columns, held, last_is_total=True),
            sections.checkpoints(run.plan),
        ]
    )


def _meaning_of_folder(name: str) -> str:
    meanings = {
        "adapter/": "the trained addition to the base model",
        "weights/": "the trained model",
        "checkpoints/": "a state to continue the training from",
        "merged/": "base and adapter as one ordinary model",
        "records": "text files",
    }
    return next((meaning for folder, meaning in meanings.items() if name.startswith(folder)), "")


def _recipe(text: str) -> Html:
    return details(
        "the recipe, every setting written out", Html(f'<pre tabindex="0">{html(text)}</pre>') if text.strip() else ""
    )


def _proof(merge: Mapping[str, Any]) -> Html:
    """The merge's errors, and the scores of the merged model beside the adapter's."""
    lines = rows.proof_rows(merge)
    scores = rows.score_rows(mapping(dig(merge, "eval", "adapter")), mapping(dig(merge, "eval", "merged")))
    if not lines:
        return Html()
    return join(
        [
            paragraph(
                "Merging builds the adapter into the base model, so that the result is one ordinary model. The proof compares what both",
                "compute: the difference must be small beside what the adapter itself changes.",
            ),
            table("The merged model beside base and adapter", ["what", "value", "meaning"], lines),
            table("Scores of both", ["score", "base and adapter", "merged", "change"], scores),
        ]
    )  # fmt: skip


def _environment(env: Mapping[str, Any]) -> Html:
    pairs = [(rows.words(name), value) for name, value in sections.flat(env, by=" ") if name != "schema_version"]
    return table("What the run was made with", ["what", "value"], pairs)

"""One page about a run: RUN_DIR/report.html, from the files in the run directory.

    in    the JSON files, logs and folders of a run (run_files.py); any may be missing
    out   one self-contained HTML file (page.py), for a reader who has never trained a model

A section whose file is missing is omitted; the end of the page lists damaged files.
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
    """The text of `report.html`, from the files that exist. Raises RunError when the folder does not exist."""
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such run directory")
    run = read_run(run_dir)
    body = [
        Section("answers", "Scores and answers", join([_scores(run.scores), answers_side_by_side(run.predictions)])),
        Section("memory", "Memory", _memory(run)),
        Section("methods", "Compared with other methods", sections.methods_side_by_side(run.plan)),
        Section("sharing", "Shared prefixes", sharing(run.plan)),
        Section("learning", "Training curves", learning(run.steps)),
        Section("rank", "Rank of the learned change", spectra_section(run.rank)),
        Section("time", "Time", _time(run)),
        Section("disk", "Disk", _disk(run)),
        Section("decisions", "Decisions and settings", join([sections.decisions(run.plan), _recipe(run.recipe)])),
        Section("proof", "Merge proof", _proof(run.merge)),
        Section("environment", "Environment", _environment(run.env)),
        Section("problems", "Files that could not be read", join(paragraph(problem) for problem in run.problems)),
    ]
    return render_page(title(run), kind=f"qlora_lite · report of the run {run.name}", lead=summary(run), sections=body)


def _scores(scores: Mapping[str, Any]) -> Html:
    """Scores before and after, with the meaning of each score."""
    lines = rows.score_rows(mapping(scores.get("before")), mapping(scores.get("after")))
    names = [name for name, (label, _) in SCORES.items() if any(line[0] == label for line in lines)]
    lines += rows.group_rows(mapping(scores.get("groups")))
    return join(
        [
            sections.terms((SCORES[name][0], SCORES[name][1]) for name in names),
            table("Scores before and after training", ["score", "before", "after", "change"], lines),
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
            join([heading("Meaning of the parts"), meanings]) if meanings else "",
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
                "Training takes far more memory than using a model. The peak decides whether it fits: the moment of a step with the",
                "highest use. It was planned part by part before training, and measured during it.",
            ),
            drawing(svg_bars(bars, budget_bytes=budget), join(_caption(bars), by=" ")),
            table("Memory at the peak of a step", ["part", *_PLANNED_AND_MEASURED], sections.with_swatches(lines), last_is_total=True),
        ]
    )  # fmt: skip


def _caption(bars: Sequence[Bar]) -> list[str]:
    is_whole = all(kind != REST for bar in bars for kind, _ in bar.segments)
    caption = "The numbers in the bars are those of the table. The budget is the memory that training may use."
    return [caption] if is_whole else [caption, "The dashed piece could not be assigned to a part."]


def _columns(memory: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`planned` and `measured`: the bytes of every part."""
    parts = mapping(memory.get("parts"))
    return {name: {key: mapping(part).get(name) for key, part in parts.items()} for name in ("planned", "measured")}


def _phases(memory: Mapping[str, Any]) -> Html:
    lines = [(sections.phase_with_meaning(name), *rest) for name, *rest in rows.phase_rows(memory)]
    phases = table("Peak memory in each phase of a step", ["phase", *_PLANNED_AND_MEASURED], lines)
    return join([phases, table("Outside the peaks", ["", ""], rows.beside_rows(memory))])


def _by_layer(timeline: Sequence[Mapping[str, Any]]) -> Html:
    """Memory held at the end of each layer: rising in the forward pass, falling in the backward pass."""
    svg = svg_timeline(timeline)
    if not svg:
        return Html()
    phases, lines = layer_rows(timeline)
    numbers = table("Memory held at the end of each layer, by phase", ["layer", *phases], lines)
    caption = (
        "A model is a stack of layers. A column is the memory held at the end of a layer, in the order of the step; "
        "memory that a layer needs only while it computes comes on top."
    )
    return join([drawing(svg, caption), details("column values", numbers)])


def _asides(memory: Mapping[str, Any]) -> Html:
    """Memory of the whole process, and retries."""
    rss = number(memory.get("rss_bytes"))
    words = f"The whole process, with Python and its libraries, took up to {rows.size(rss)} of host memory."
    return join([note(words if rss else ""), *(note(f"Retried: {retry}") for retry in rows.retries_of(memory))])


def _time(run: Run) -> Html:
    """Time by phase; without phases, training and the rest."""
    lines = [
        (name, shown, join([share, share_bar(float(share.removesuffix("%")))]))
        for name, shown, share in rows.time_rows(rows.phases_of(run.train), number(run.train.get("wall_s")))
    ]
    return table("Where the time went", ["phase", "time", "share"], lines, last_is_total=True)


def _disk(run: Run) -> Html:
    """Contents of the run directory, and the size of checkpoints of other kinds."""
    held = [(name, _meaning_of_folder(name), size) for name, size in rows.disk_rows(run.disk)]
    columns = ["folder", "contents", "size"]
    return join(
        [
            table("Contents of the run directory", columns, held, last_is_total=True),
            sections.checkpoints(run.plan),
        ]
    )


def _meaning_of_folder(name: str) -> str:
    meanings = {
        "adapter/": "the trained change of the base model",
        "weights/": "the trained model",
        "checkpoints/": "a state to resume training from",
        "merged/": "base and adapter as one ordinary model",
        "records": "text files",
    }
    return next((meaning for folder, meaning in meanings.items() if name.startswith(folder)), "")


def _recipe(text: str) -> Html:
    return details(
        "the recipe with every setting", Html(f'<pre tabindex="0">{html(text)}</pre>') if text.strip() else ""
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
                "Merging adds the adapter to the base model; the result is one ordinary model. The proof compares the outputs of both:",
                "the difference must be small relative to the effect of the adapter.",
            ),
            table("Merged model compared with base and adapter", ["quantity", "value", "meaning"], lines),
            table("Scores of both models", ["score", "base and adapter", "merged", "change"], scores),
        ]
    )  # fmt: skip


def _environment(env: Mapping[str, Any]) -> Html:
    pairs = [(rows.words(name), value) for name, value in sections.flat(env, by=" ") if name != "schema_version"]
    return table("Software and hardware of the run", ["item", "value"], pairs)

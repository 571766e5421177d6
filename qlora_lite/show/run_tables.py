"""The report of a run on the terminal: the tables of its page, from the same files and rows."""

from pathlib import Path

from qlora_lite.show import rows
from qlora_lite.show.lenient import dig, mapping, number
from qlora_lite.show.run_files import read_run
from qlora_lite.show.tables import (
    show_memory,
    show_methods,
    show_proof,
    show_reasons,
    show_scores,
    show_table,
    show_time,
)
from qlora_lite.show.text import say_warning


def show_run(run_dir: Path | str) -> None:
    """Scores, memory, methods, time, disk, decisions and proof; tables without data are omitted."""
    run = read_run(Path(run_dir))
    before, after = (mapping(run.scores.get(side)) for side in ("before", "after"))
    if rows.score_rows(before, after):
        show_scores(before, after, groups=mapping(run.scores.get("groups")))
    show_memory(run.memory)
    show_methods(mapping(run.plan.get("methods")))
    show_time(rows.phases_of(run.train), wall_s=number(run.train.get("wall_s")))
    show_table("on disk", ["", "size"], rows.disk_rows(run.disk), last_is_total=True)
    show_reasons(rows.reasons_of(run.plan))
    if rows.proof_rows(run.merge):
        show_proof(run.merge)
        merged = mapping(dig(run.merge, "eval", "merged"))
        if merged:
            show_scores(mapping(dig(run.merge, "eval", "adapter")), merged, title="adapter (before) and merged (after)")
    for problem in run.problems:
        say_warning(f"could not be read: {problem}")

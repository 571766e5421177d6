"""Show: the last stage, and the only one that knows a terminal or HTML.

    text        safe_text, console, print_json     what may be printed, and where: people's text on stderr, JSON and pages on stdout
    phases      phase                              "loading the base: 3.2 s"
    screen      TrainScreen                        a live progress bar on a terminal, plain lines elsewhere
    rows        part_rows, score_rows, ...         the rows that tables and pages both show
    tables      show_memory, show_scores, ...      one function a table, for the terminal
    run_tables  show_run                           all of a run's tables, for the terminal
    spectra     show_spectra, show_rank_curve      what an adapter has learned
    report      render_report                      a run directory -> the text of one self-contained page
    plan_page   write_plan_page                    a plan -> one self-contained page

A page is put together by page.py (shell, style sheet page.css, tables) from pieces of summary.py, answers.py, learning.py and sections.py;
bars.py, curves.py, sharing.py and timeline.py draw; run_files.py and lenient.py read what a run left, damaged or not.

Everything here takes plain values or the small dataclasses of the stages before it, and returns nothing that they need.
"""

from qlora_lite.show.phases import Phase, phase
from qlora_lite.show.plan_page import write_plan_page
from qlora_lite.show.report import render_report
from qlora_lite.show.run_tables import show_run
from qlora_lite.show.screen import TrainScreen
from qlora_lite.show.spectra import show_rank_curve, show_scales, show_spectra
from qlora_lite.show.tables import (
    show_answers,
    show_cards,
    show_findings,
    show_memory,
    show_memory_map,
    show_methods,
    show_plan,
    show_proof,
    show_reasons,
    show_rows,
    show_scores,
    show_sweep,
    show_table,
    show_time,
    show_truncation,
    stream_answer,
)
from qlora_lite.show.text import console, print_json, print_markdown, safe_text, say, say_error, say_warning

__all__ = [
    "Phase",
    "TrainScreen",
    "console",
    "phase",
    "print_json",
    "print_markdown",
    "render_report",
    "safe_text",
    "say",
    "say_error",
    "say_warning",
    "show_answers",
    "show_cards",
    "show_findings",
    "show_memory",
    "show_memory_map",
    "show_methods",
    "show_plan",
    "show_proof",
    "show_rank_curve",
    "show_reasons",
    "show_rows",
    "show_run",
    "show_scales",
    "show_scores",
    "show_spectra",
    "show_sweep",
    "show_table",
    "show_time",
    "show_truncation",
    "stream_answer",
    "write_plan_page",
]

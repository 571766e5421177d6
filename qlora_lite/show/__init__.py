"""Show: the last stage, and the only one that knows a terminal or HTML.

    text.py         safe_text, console, print_json: text for people on stderr, JSON and pages on stdout
    phases.py       phase: "loading the base: 3.2 s"
    screen.py       TrainScreen: a live progress bar on a terminal, plain lines elsewhere
    tables.py       show_memory, show_scores, ...: one function per table, for the terminal
    run_tables.py   show_run: all tables of a run, for the terminal
    spectra.py      show_spectra, show_rank_curve: the spectrum of an adapter's change
    rows.py         part_rows, score_rows, ...: the rows that tables and pages share
    report.py       render_report: a run directory -> the text of one self-contained page
    plan_page.py    write_plan_page: a plan -> one self-contained page
    page.py         the shell of a page (style sheet: page.css), headings, tables, figures
    summary.py      the opening of a run's report
    answers.py      questions with the answers of base and tuned model side by side
    learning.py     loss, learning rate, gradient norm, pace
    sections.py     sections that both pages have
    bars.py         bars of memory, as SVG
    curves.py       curves over steps, as SVG
    sharing.py      shared prefixes, drawn as a tree
    timeline.py     memory over one step by layer, as SVG
    run_files.py    read the files of a run directory, damaged or not
    lenient.py      read JSON documents of any shape

Input: plain values or the small dataclasses of earlier stages. Output: nothing that those stages need.
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

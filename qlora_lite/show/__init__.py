"""Show: the last stage, and the only one that knows a terminal or HTML.

    text      safe_text, console, print_json     what may be printed, and where: people's text on stderr, JSON on stdout
    phases    phase                              "loading the base: 3.2 s"
    screen    TrainScreen                        a live progress bar on a terminal, plain lines elsewhere
    tables    show_memory, show_scores, ...      one function a table
    report    write_report                       a run directory -> one self-contained report.html

Everything here takes plain values or the small dataclasses of the stages before it, and returns nothing that they need.
"""

from qlora_lite.show.phases import Phase, phase
from qlora_lite.show.report import write_report
from qlora_lite.show.screen import TrainScreen
from qlora_lite.show.tables import (
    show_answers,
    show_findings,
    show_fits,
    show_memory,
    show_memory_map,
    show_methods,
    show_proof,
    show_reasons,
    show_rows,
    show_scores,
    show_sweep,
    show_table,
    show_truncation,
    stream_answer,
)
from qlora_lite.show.text import console, print_json, safe_text, say, say_error, say_warning

__all__ = [
    "Phase",
    "TrainScreen",
    "console",
    "phase",
    "print_json",
    "safe_text",
    "say",
    "say_error",
    "say_warning",
    "show_answers",
    "show_findings",
    "show_fits",
    "show_memory",
    "show_memory_map",
    "show_methods",
    "show_proof",
    "show_reasons",
    "show_rows",
    "show_scores",
    "show_sweep",
    "show_table",
    "show_truncation",
    "stream_answer",
    "write_report",
]

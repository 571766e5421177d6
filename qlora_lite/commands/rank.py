"""The verb `rank`: the spectrum of an adapter's change, and a recommended rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite import show
from qlora_lite.commands.compared import judge_of
from qlora_lite.commands.report import write_report
from qlora_lite.commands.shorten import Shortened, shorten
from qlora_lite.errors import UserError
from qlora_lite.runs.adapters import RankReport, open_source, rank_report


@dataclass(frozen=True)
class Ranked:
    """The spectrum of a run's change, and the shorter adapter if one was written."""

    report: RankReport
    shortened: Shortened | None

    def to_json_dict(self) -> dict[str, Any]:
        shortened = {} if self.shortened is None else {"truncated": self.shortened.to_json_dict()}
        return self.report.to_json_dict() | shortened


def rank(
    run_dir: Path,
    *,
    other: Path | None = None,
    to: int | None = None,
    num_parameters: int | None = None,
    out: Path | None = None,
    dtype: str = "fp32",
    score: bool = True,
    base: Path | None = None,
) -> Ranked:
    """The spectrum of a run's change, and the advice; with `to` or `num_parameters` a shorter adapter at `out`, and its cost.

    `dtype` is the storage type of the shorter adapter's factors.
    """
    source = open_source(run_dir)
    with show.phase("singular values of every change"):
        report = rank_report(source, None if other is None else open_source(other))
    show.show_spectra(report.to_json_dict())
    shortened = None
    if to is not None or num_parameters is not None:
        if out is None:
            raise UserError("rank: --to and --parameters write a shorter adapter; name its folder with --out DIR")
        judge = judge_of(source, base) if score else None
        shortened = shorten(source, out, rank=to, num_parameters=num_parameters, dtype=dtype, judge=judge)
    elif source.run is not None:
        with source.run.locked():
            source.run.write_json("rank.json", report.to_json_dict())
            write_report(source.run)
    show.say(report.advice)
    return Ranked(report, shortened)

"""Predict: a Recipe -> `Plan`: the recipe without any `auto`, why each was chosen so, and what the run will need.

choose.py      what `auto` becomes, with reasons        compare.py   QLoRA, LoRA and full fine-tuning side by side
rehearsal.py   a step on the meta device, in a ledger   fits.py      what fits a budget
scoring.py     evaluation, rehearsed there as well      merging.py   a merge and its proof too
forecast.py    the memory report of any model          request.py   a model's name or a recipe -> what to forecast
"""

from qlora_lite.plan.choose import Plan, make_plan
from qlora_lite.plan.compare import METHODS, Comparison, as_json
from qlora_lite.plan.fits import Cell, Room
from qlora_lite.plan.forecast import CARDS, Forecast, forecast, sweep
from qlora_lite.plan.merging import Merging, merge_peak_host_bytes, proof_peak_host_bytes
from qlora_lite.plan.rehearsal import MicroBatch, Rehearsal, Settings, Stage
from qlora_lite.plan.request import Request, read_request
from qlora_lite.plan.scoring import Scoring

__all__ = [
    "CARDS",
    "METHODS",
    "Cell",
    "Comparison",
    "Forecast",
    "Merging",
    "MicroBatch",
    "Plan",
    "Rehearsal",
    "Request",
    "Room",
    "Scoring",
    "Settings",
    "Stage",
    "as_json",
    "forecast",
    "make_plan",
    "merge_peak_host_bytes",
    "proof_peak_host_bytes",
    "read_request",
    "sweep",
]

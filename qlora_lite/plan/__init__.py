"""Predict: a Recipe -> `Plan`: the recipe without any `auto`, why each was chosen so, and what the run will need.

choose.py      a recipe -> Plan                         planner.py   make it fit a budget, with reasons
request.py     a model's name or a recipe -> Request    strategy.py  ways to compute a step, from fastest to leanest
forecast.py    Request -> the memory report             budget.py    how much memory there is
rehearsal.py   a step on the meta device, in a ledger   compare.py   QLoRA, LoRA and full fine-tuning side by side
scoring.py     evaluation, rehearsed there as well      fits.py      the map of lengths and batches, the longest sequence
merging.py     a merge and its proof too                workspace.py what operators allocate in themselves
"""

from qlora_lite.plan.compare import METHODS, Comparison, Rehearsals, as_json
from qlora_lite.plan.fits import Cell, Room
from qlora_lite.plan.forecast import CARDS, Forecast, forecast, sweep
from qlora_lite.plan.merging import Merging, merge_peak_host_bytes, proof_peak_host_bytes
from qlora_lite.plan.needs import what_is_shared
from qlora_lite.plan.rehearsal import MicroBatch, Rehearsal, Settings, Stage
from qlora_lite.plan.request import plan_of_model, read_request
from qlora_lite.plan.resolve import Resolved, refuse_wrong_modules
from qlora_lite.plan.run_plan import Plan, make_plan
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
    "Rehearsals",
    "Resolved",
    "Room",
    "Scoring",
    "Settings",
    "Stage",
    "as_json",
    "forecast",
    "make_plan",
    "merge_peak_host_bytes",
    "plan_of_model",
    "proof_peak_host_bytes",
    "read_request",
    "refuse_wrong_modules",
    "sweep",
    "what_is_shared",
]

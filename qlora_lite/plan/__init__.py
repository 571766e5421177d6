"""Plan a run: recipe -> the recipe without any `auto`, the reason for each value, and the memory that the run will need.

request.py          a model's name, a folder or a recipe -> Resolved, for the command `plan`
run_plan.py         a recipe whose base and data exist -> Plan, for training, scoring and merging
resolve.py          used by both: a value and a reason for every auto
needs.py            requirements of the data                              budget.py          available memory
planner.py          choose settings that fit                              strategy.py        ways to compute a step, fastest first
rehearsal.py        rehearse a step on the meta device, in a ledger       scoring.py         rehearse an evaluation
merging.py          rehearse a merge and its proof                        compare.py         QLoRA, LoRA, full fine-tuning side by side
homes.py            steps with layers in chunks and parts of the model elsewhere
fits.py             the map of lengths and batches, the longest sequence  largest.py         the largest known model that fits
forecast.py         Resolved -> the memory report                         workspace.py       internal allocations of operators
card_workspace.py   internal allocations of operators on a card
"""

from qlora_lite.plan.compare import METHODS, Comparison, Rehearsals, as_json
from qlora_lite.plan.fits import Cell, Room
from qlora_lite.plan.forecast import CARDS, Forecast, SweptModel, forecast, sweep
from qlora_lite.plan.merging import Merging, merge_peak_host_bytes, proof_peak_host_bytes
from qlora_lite.plan.needs import reading_of, what_is_shared
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
    "SweptModel",
    "as_json",
    "forecast",
    "make_plan",
    "merge_peak_host_bytes",
    "plan_of_model",
    "proof_peak_host_bytes",
    "read_request",
    "reading_of",
    "refuse_wrong_modules",
    "sweep",
    "what_is_shared",
]

"""Predict: a Recipe -> `Plan`: the recipe without any `auto`, why each was chosen so, and what the run will need.

choose.py   what `auto` becomes, with reasons      estimate.py   bytes by arithmetic on the model's shapes
"""

from qlora_lite.plan.choose import Plan, make_plan
from qlora_lite.plan.estimate import Estimate, estimate_memory

__all__ = ["Estimate", "Plan", "estimate_memory", "make_plan"]

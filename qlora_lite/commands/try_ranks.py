"""`rank --try`: train a recipe with several ranks, for a share of its epochs, and compare."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite import api, show
from qlora_lite.commands.scoring import score
from qlora_lite.errors import UserError
from qlora_lite.evaluation import EvalResult
from qlora_lite.merging.advice import TrainedRank, advice_of_curve
from qlora_lite.plan import Plan
from qlora_lite.recipe import load_recipe
from qlora_lite.runs.folder import RunDir


@dataclass(frozen=True)
class TriedRank:
    """One rank: its sizes, its training and its scores."""

    r: int
    planned_peak_bytes: int
    adapter_bytes: int
    num_steps: int
    train_s: float
    result: EvalResult

    def to_json_dict(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key != "result"}
        return own | self.result.to_json_dict()


@dataclass(frozen=True)
class TriedRanks:
    """The ranks in order, each trained for a share of the recipe's epochs."""

    curve: tuple[TriedRank, ...]
    share: float
    advice: str

    def to_json_dict(self) -> dict[str, Any]:
        return {"curve": [line.to_json_dict() for line in self.curve], "share": self.share, "advice": self.advice}


def try_ranks(recipe_name: str, overrides: Sequence[str], *, ranks: Sequence[int], share: float) -> TriedRanks:
    """Train each rank for a share of the recipe's epochs and score it: scores by rank, and the advice."""
    if not ranks or min(ranks) < 1 or not 0 < share <= 1:
        raise UserError(
            "rank: --try takes whole numbers above 0, such as 1,2,4,8,16, and --share a number above 0, at most 1"
        )
    recipe = load_recipe(recipe_name, overrides=overrides)
    if recipe.method == "full" or recipe.data.eval is None:
        raise UserError(
            f"{recipe_name}: trying ranks needs an adapter (method qlora or lora) and held-out rows (data.eval)"
        )
    ratio, epochs = recipe.lora.lora_alpha / recipe.lora.r, (recipe.train.epochs or 1.0) * share
    plans: dict[int, Plan] = {}
    for r in sorted(set(ranks)):  # plan all ranks before training the first
        own = [f"lora.r={r}", f"lora.lora_alpha={max(1, round(ratio * r))}", f"train.epochs={epochs:g}"]
        own += [f"train.max_steps={max(1, round(recipe.train.max_steps * share))}"] if recipe.train.max_steps else []
        plans[r] = api.make_plan(load_recipe(recipe_name, overrides=[*overrides, *own]))
        plans[r].refuse_what_does_not_fit()
    curve = tuple(_try_rank(plan, r) for r, plan in plans.items())
    advice = advice_of_curve([_as_trained(line) for line in curve])
    show.show_rank_curve([line.to_json_dict() for line in curve])
    show.say(advice)
    return TriedRanks(curve, share, advice)


def _as_trained(line: TriedRank) -> TrainedRank:
    """The numbers that the advice depends on."""
    result = line.result
    return TrainedRank(line.r, line.planned_peak_bytes, result.num_examples, result.loss, result.exact_match)


def _try_rank(plan: Plan, r: int) -> TriedRank:
    """One line of the curve, trained in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="qlora-lite-") as folder:
        run = RunDir(Path(folder) / "run")
        with show.phase(f"r={r}: training"):
            loaded = api.load_model(plan)
            steps = list(api.train(plan, loaded, run.path))
        adapter_bytes = sum(path.stat().st_size for path in run.adapter.glob("*.safetensors"))
    result = score(plan, loaded, f"r={r}: scoring")
    train_s = sum(step.step_s for step in steps)
    return TriedRank(r, plan.peak_bytes, adapter_bytes, len(steps), train_s, result)

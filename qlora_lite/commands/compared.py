"""The share of an adapter's effect that a shortened or mixed one loses, on held-out rows of the run it was made from."""

from dataclasses import dataclass
from pathlib import Path

from qlora_lite import api, show
from qlora_lite.plan import Plan
from qlora_lite.runs.adapters import Source
from qlora_lite.runs.folder import RunDir


@dataclass(frozen=True)
class Judge:
    """A run with its base and held-out rows, on which two adapters can be compared."""

    run: RunDir
    plan: Plan

    def effect_lost(self, exact: Path, other: Path) -> api.EffectLost:
        """The share of the effect of the adapter at `exact` that the one at `other` loses. Raises ModelError."""
        with show.phase("comparing the two on held-out rows") as phase:
            lost = api.effect_lost(self.plan, self.run, exact, other)
            phase.note(f"{lost.lost_share:.2%} of the adapter's effect lost, {lost.num_label_tokens} label tokens")
        return lost


def judge_of(source: Source | None, base: Path | None) -> Judge | None:
    """The judge of an adapter; None when no run made it, or when the run has no held-out rows (any more).

    Call it before writing anything: raises RunError when the run's base is missing or has changed.
    """
    if source is None or source.run is None:
        return None
    run, plan = api.open_run(source.run.path, base=base)
    if plan.recipe.data.eval is None:
        return None
    if not Path(plan.recipe.data.eval).exists():
        show.say(f"{plan.recipe.data.eval}: the run's held-out file is missing, so nothing is scored")
        return None
    api.run_base(plan, run)
    return Judge(run, plan)

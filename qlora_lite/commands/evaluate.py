"""The verb `eval`: score one model of a run."""

from collections.abc import Sequence
from pathlib import Path

from qlora_lite import api, show
from qlora_lite.commands.scoring import score
from qlora_lite.errors import UserError
from qlora_lite.evaluation import EvalResult, by_phrasing


def evaluate(
    run_dir: Path, *, which: str, data: Path | None, overrides: Sequence[str] = (), base: Path | None = None
) -> EvalResult:
    """Score one of the run's models on its held-out rows or on another file; `overrides` set eval keys (`eval.max_seq_length=1024`)."""
    name = api.model_of_run(which)
    if data is not None and any(override.startswith("eval.num_examples") for override in overrides):
        raise UserError(
            "eval: --data scores every row of its file, so eval.num_examples has no effect. Leave one of them out"
        )
    run, plan = api.open_run(run_dir, overrides=overrides, base=base)
    models = api.run_models(plan, run, [name])
    with show.phase(f"loading the {name} model"):
        loaded = next(models)
    result = score(plan, loaded, f"scoring the {name} model", data=data)
    groups = {
        f"{name} phrasing": {"before": {}, "after": group} for name, group in by_phrasing(result.predictions).items()
    }
    show.show_scores(
        None, result.to_json_dict(), groups=groups, title=f"{which} model, {result.num_examples} questions"
    )
    return result

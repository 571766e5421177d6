"""Publish the result of training: copy the best checkpoint's weights to adapter/ or weights/ of the run."""

import shutil
from collections.abc import Callable

from qlora_lite.base.generation_settings import add_stop_tokens
from qlora_lite.files.manifest import write_manifest
from qlora_lite.files.staging import remove_folder, staged_folder
from qlora_lite.model.trained import folder_name
from qlora_lite.plan import Plan
from qlora_lite.runs.folder import RunDir
from qlora_lite.runs.loading import LoadedModel, template_of
from qlora_lite.training import TrainState, best_valid


def publish(run: RunDir, plan: Plan, loaded: LoadedModel, state: TrainState, say: Callable[[str], None]) -> None:
    """Copy the best checkpoint's trained weights to adapter/ or weights/, completely or not at all, and load them into the model.

    Adds a tokenizer with new tokens, and generation settings with the stop tokens of training. Its manifest.json has the step and the
    hashes of all files.
    """
    name = folder_name(state.model)
    last_step, best = state.step, state.best
    checkpoint, problems = best_valid(run.checkpoints, best)
    for problem in problems:
        say(problem)
    assert checkpoint is not None  # the last step has written one
    state.load(checkpoint)
    remove_folder(run.path / name)
    with staged_folder(run.path / name) as staging:
        for path in (checkpoint / name).iterdir():
            shutil.copyfile(path, staging / path.name)
        if plan.recipe.data.special_tokens:
            loaded.tokenizer.save_pretrained(str(staging))
        add_stop_tokens(staging, template_of(plan, loaded.tokenizer).stop_token_ids, base=loaded.base)
        write_manifest(staging, {"step": state.step})
    if best is not None and state.step == best.step:
        last = run.read_steps()[-1]["eval_loss"]
        comparison = f"; the last step has {last:.3f}" if best.step != last_step else ", which is the last step"
        say(f"{name}/ holds step {best.step}, with the lowest validation loss, {best.eval_loss:.3f}{comparison}")

"""`ask --mix` and `merge --mix`: the weighted sum of several adapters, used and not kept."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from qlora_lite import api, show
from qlora_lite.commands.ask import Answers, answer
from qlora_lite.commands.merge import Merged, merge
from qlora_lite.errors import RunError, UserError
from qlora_lite.merging.mix import mix_adapters
from qlora_lite.runs.adapters import Blend, mix, parse_part, parts_of
from qlora_lite.runs.folder import RunDir


def ask_mix(
    run_dir: Path, question: str, parts: Sequence[str], *, passage: str | None, base: Path | None = None
) -> Answers:
    """Answer with the weighted sum of several adapters, without writing anything."""
    run, plan = api.open_run(run_dir, base=base)
    api.run_base(plan, run)
    asked, _ = parts_of([parse_part(part) for part in parts])
    with show.phase("loading the base and the adapters"):
        loaded = Blend(plan, {"mix": mix_adapters(asked).adapter}).use({"mix": 1.0})
    return Answers({"mix": answer(plan, loaded, "mix", question, passage)})


def merge_mix(
    run_dir: Path, out: Path | None, parts: Sequence[str], overrides: Sequence[str], *, base: Path | None = None
) -> Merged:
    """Merge the weighted sum of several adapters into the base of the run, with proof."""
    if out is None:
        raise UserError("merge: --mix needs an output folder: qlora-lite merge RUN_DIR OUT --mix RUN_DIR:WEIGHT ...")
    with tempfile.TemporaryDirectory(prefix="qlora-lite-") as folder:
        mixed = Path(folder) / "mix"
        mix([parse_part(part) for part in parts], mixed)
        if not RunDir(mixed).has_begun:
            raise RunError(f"{run_dir}: at least one adapter of a mix must be a run, because only a run names its base")
        return merge(mixed, out, overrides, base=base)

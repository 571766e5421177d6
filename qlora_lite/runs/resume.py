"""When a run may go on: with the same recipe but for keys that change nothing trained, on the same base and the same data.

What is computed with other versions or another number of threads may differ in its last bits: that is said, not refused.
"""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora_lite.base.identity import files_of_base
from qlora_lite.base.shipped import default_cache
from qlora_lite.base.source import find_base
from qlora_lite.data.files import hash_file
from qlora_lite.data.read import as_pairs, file_identity
from qlora_lite.device.card import Card
from qlora_lite.errors import ModelError, RunError
from qlora_lite.files.manifest import MANIFEST_NAME, read_manifest
from qlora_lite.recipe import Recipe, dump_recipe, load_run_recipe
from qlora_lite.runs.folder import RunDir, in_command

PACKAGES = ("qlora-lite", "torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
# Keys, besides those of merge, that change nothing that is trained.
MAY_DIFFER = frozenset({"train.save_every_steps", "train.keep_checkpoints", "train.trackers", "eval.max_seq_length"})


def refuse_other_recipe(run: RunDir, recipe: Recipe) -> None:
    """Raise RunError for a resolved `recipe` that is not the run's, but for what may differ: it would silently mix two runs."""
    changed = _differences(load_run_recipe(run.recipe), recipe)
    refused = [f"{key} was {was}, is {now}" for key, was, now in changed if not _may_differ(key)]
    if refused:
        raise RunError(f"{run.path}: cannot resume with another recipe: {'; '.join(refused)}. Start a new run instead")


def go_on_with(run: RunDir, recipe: Recipe) -> list[str]:
    """Make what may differ in a resolved `recipe` the run's; -> a sentence for each key. Raises RunError for anything else."""
    refuse_other_recipe(run, recipe)
    changed = list(_differences(load_run_recipe(run.recipe), recipe))
    if changed:
        run.write_text(run.recipe.name, dump_recipe(recipe))
    return [f"{key} was {was}, is {now} from here on: it changes nothing that is trained" for key, was, now in changed]


def _differences(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) of every key that differs."""
    old, new = (recipe.model_dump(mode="json") for recipe in (before, now))
    for section, values in new.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            was = old[section][key] if key else old[section]
            if was != value:
                yield f"{section}.{key}" if key else section, was, value


def _may_differ(key: str) -> bool:
    return key.startswith("merge.") or key in MAY_DIFFER


def refuse_other_base(run: RunDir, now: str, folder: Path) -> None:
    """Raise RunError where the base in `folder`, whose weights' SHA-256 is `now`, is not the run's: other weights, config or tokenizer."""
    env = run.read_json("env.json")
    then = env.get("base_sha256")
    if then is not None and now != then:
        raise RunError(
            f"{run.path}: was trained on another base (SHA-256 {then[:12]}..., now {now[:12]}...). {_how_to_get_it_back(run)}"
        )
    recorded, there = env.get("base_files"), files_of_base(folder)
    if not isinstance(recorded, dict):  # a run of an earlier version has no record of them
        return
    changed = [name for name in sorted(recorded.keys() | there.keys()) if recorded.get(name) != there.get(name)]
    if changed:
        raise RunError(
            f"{run.path}: the base's weights are the run's own, but {' and '.join(changed)} in {folder} differ from what it was trained "
            "with. Put back what was there then, or give --base DIR with the folder as it was"
        )


def refuse_missing_base(run: RunDir, recipe: Recipe) -> None:
    """Raise RunError, with the way to name it, where the run's base is not where it was."""
    try:
        find_base(recipe.model.base, cache=default_cache(), revision=recipe.model.revision)
    except ModelError as error:
        kept = _kept_artefact(run)
        also = f", or the quantized copy that the run was trained on: --base {in_command(kept)}" if kept else ""
        raise RunError(
            f"{run.path}: its base cannot be used where it was ({error}). If it lies elsewhere now, add --base DIR (its hash is "
            f"checked){also}"
        ) from error


def _kept_artefact(run: RunDir) -> Path | None:
    """The quantized base of the run, where it is still in the cache."""
    path = Path(str(run.read_json("env.json").get("base") or ""))
    return path if path.is_absolute() and (path / MANIFEST_NAME).is_file() else None


def _how_to_get_it_back(run: RunDir) -> str:
    """Advice for a base of other bytes: it is another model, or it was quantized with something else than then."""
    env = run.read_json("env.json")
    if load_run_recipe(run.recipe).model.quantization == "none":
        return "Give the folder that it was trained on: --base DIR"
    kept, then = _kept_artefact(run), env.get("versions")
    if kept is not None:
        return f"The quantized copy that it was trained on is still there: --base {in_command(kept)}"
    was = then.get("bitsandbytes") if isinstance(then, dict) else None
    here = f"bitsandbytes {was} on {env.get('card') or env.get('device')}, here with {version('bitsandbytes')}"
    return (
        "Give the original that it was quantized from: --base DIR. If this is the original, quantizing it again has rounded differently "
        f"(then with {here}): run it once with that version on such a device, put the old cache back, or train again"
    )


def data_hashes(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each file that rows are read from, by its path; of a folder one over the hashes of all its files."""
    files = [str(path) for path, _ in as_pairs(recipe.data.train_files)]
    files += [] if recipe.data.eval is None else [recipe.data.eval]
    return {file: _data_hash(Path(file)) for file in files}


def _data_hash(path: Path) -> str:
    return sha256("\n".join(file_identity(path)).encode()).hexdigest() if path.is_dir() else hash_file(path)


def refuse_other_data(run: RunDir, now: Mapping[str, str]) -> None:
    """Raise RunError where a file holds other bytes than when the run began."""
    then = run.read_json("env.json").get("data_sha256", now)
    changed = [
        f"{file} (SHA-256 {then[file][:12]}..., now {digest[:12]}...)"
        for file, digest in now.items()
        if then.get(file, digest) != digest
    ]
    if changed:
        raise RunError(
            f"{run.path}: cannot resume, the data have changed since the run began: {', '.join(changed)}. Put the file back as it "
            "was, or start a new run"
        )


def versions() -> dict[str, str]:
    """Of the packages that decide what is computed."""
    return {name: version(name) for name in PACKAGES}


def computed_with(recipe: Recipe, card: Card) -> dict[str, Any]:
    """What a checkpoint's manifest says of how it came about."""
    return {
        "recipe_sha256": fixed_sha256(recipe),
        "device": card.in_words,
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
    }


def fixed_sha256(recipe: Recipe) -> str:
    """Of the resolved recipe without what may differ when the run is resumed."""
    values = recipe.model_dump(mode="json")
    kept = {
        f"{section}.{key}": value
        for section, entries in values.items()
        for key, value in (entries.items() if isinstance(entries, dict) else [("", entries)])
        if not _may_differ(f"{section}.{key}")
    }
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def computed_otherwise(checkpoint: Path, recipe: Recipe, card: Card) -> Iterator[str]:
    """Why going on from `checkpoint` may not be bit-identical to never having stopped."""
    then, now = read_manifest(checkpoint) or {}, computed_with(recipe, card)
    if then.get("device", now["device"]) != now["device"]:
        yield (
            f"before it was {then['device']}, now it is {now['device']}: sums are formed in another order, so the last bits differ, and "
            "dropout draws other random numbers"
        )
    if card.is_cpu and then.get("num_threads", now["num_threads"]) != now["num_threads"]:
        yield (
            f"before it was {then['num_threads']} threads, now it is {now['num_threads']}: sums are formed in another order, so "
            f"the last bits may differ. OMP_NUM_THREADS={then['num_threads']} keeps them"
        )
    before = then.get("versions", {})
    changed = [
        f"{name} {before[name]} -> {new}" for name, new in now["versions"].items() if before.get(name, new) != new
    ]
    if changed:
        yield f"other versions than before, so the last bits may differ: {', '.join(changed)}"

"""Conditions for resuming a run: the same recipe except keys that do not affect training, the same base and the same data.

Other versions or another number of threads may change the last bits of results: a note names them, and the run continues.
"""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora_lite.base.identity import files_of_base
from qlora_lite.base.source import find_base
from qlora_lite.data.files import hash_file
from qlora_lite.data.read import as_pairs, file_identity
from qlora_lite.device.card import Card
from qlora_lite.errors import ModelError, RunError
from qlora_lite.files.cache import default_cache
from qlora_lite.files.manifest import MANIFEST_NAME, read_manifest
from qlora_lite.recipe import Recipe, dump_recipe, load_run_recipe
from qlora_lite.recipe.schema import ON_DEVICE
from qlora_lite.runs.folder import RunDir, in_command

PACKAGES = ("qlora-lite", "torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
# Keys, besides those of merge, that do not affect training.
MAY_DIFFER = frozenset({"train.save_every_steps", "train.keep_checkpoints", "train.trackers", "eval.max_seq_length"})
# Where parts of the model wait changes no bit; the chunk changes last ones, so it stays.
_HOMES = {f"memory.{key}": value for key, value in ON_DEVICE.items()}
_CHUNK = "memory.chunk_tokens"


def refuse_other_recipe(run: RunDir, recipe: Recipe) -> None:
    """Raise RunError if a resolved `recipe` differs from the run's in a key that affects training: it would silently mix two runs."""
    changed = _differences(load_run_recipe(run.recipe), recipe)
    refused = [f"{key} was {was}, is {now}" for key, was, now in changed if not _may_differ(key)]
    if refused:
        raise RunError(f"{run.path}: cannot resume with another recipe: {'; '.join(refused)}. Start a new run instead")


def go_on_with(run: RunDir, recipe: Recipe) -> list[str]:
    """Store the changes of a resolved `recipe` that do not affect training -> one sentence per key. Raises RunError for others."""
    refuse_other_recipe(run, recipe)
    changed = list(_differences(load_run_recipe(run.recipe), recipe))
    if changed:
        run.write_text(run.recipe.name, dump_recipe(recipe))
    return [f"{key} was {was}, is {now} from now on; it does not affect training" for key, was, now in changed]


def _differences(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value before, value now) of every key that differs."""
    old, new = (recipe.model_dump(mode="json") for recipe in (before, now))
    for section, values in new.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            was = old[section][key] if key else old[section]
            if was == "auto":  # a run of a version without these keys had everything on the device
                was = _HOMES.get(f"{section}.{key}", was)
            if was != value:
                yield f"{section}.{key}" if key else section, was, value


def _may_differ(key: str) -> bool:
    return (
        key.startswith("merge.") or key in MAY_DIFFER or key in _HOMES.keys() - {_CHUNK} or key == "memory.host_budget"
    )


def refuse_other_base(run: RunDir, now: str, folder: Path) -> None:
    """Raise RunError if the base in `folder`, with weights of SHA-256 `now`, is not the run's: other weights, config or tokenizer."""
    env = run.read_json("env.json")
    then = env.get("base_sha256")
    if then is not None and now != then:
        raise RunError(
            f"{run.path}: was trained on another base (SHA-256 {then[:12]}..., now {now[:12]}...). {_how_to_get_it_back(run)}"
        )
    recorded, present = env.get("base_files"), files_of_base(folder)
    if not isinstance(recorded, dict):  # a run of an earlier version did not record them
        return
    changed = [name for name in sorted(recorded.keys() | present.keys()) if recorded.get(name) != present.get(name)]
    if changed:
        raise RunError(
            f"{run.path}: the base's weights are unchanged, but {' and '.join(changed)} in {folder} changed since training. "
            "Restore them, or give --base DIR with an unchanged folder"
        )


def refuse_missing_base(run: RunDir, recipe: Recipe) -> None:
    """Raise RunError, with advice on --base, if the run's base is not at its recorded place."""
    try:
        find_base(recipe.model.base, cache=default_cache(), revision=recipe.model.revision)
    except ModelError as error:
        artefact = _kept_artefact(run)
        alternative = f", or use the quantized copy from training: --base {in_command(artefact)}" if artefact else ""
        raise RunError(
            f"{run.path}: its base is not usable at its recorded place ({error}). If it was moved, add --base DIR (its hash is "
            f"checked){alternative}"
        ) from error


def _kept_artefact(run: RunDir) -> Path | None:
    """Return the quantized base of the run if it is still in the cache."""
    path = Path(str(run.read_json("env.json").get("base") or ""))
    return path if path.is_absolute() and (path / MANIFEST_NAME).is_file() else None


def _how_to_get_it_back(run: RunDir) -> str:
    """Return advice for a base of other bytes: another model, or one quantized by another version or device."""
    env = run.read_json("env.json")
    if load_run_recipe(run.recipe).model.quantization == "none":
        return "Give the folder used in training: --base DIR"
    artefact, then = _kept_artefact(run), env.get("versions")
    if artefact is not None:
        return f"The quantized copy from training still exists: --base {in_command(artefact)}"
    was = then.get("bitsandbytes") if isinstance(then, dict) else None
    change = f"bitsandbytes {was} on {env.get('card') or env.get('device')}, now with {version('bitsandbytes')}"
    return (
        "Give the original that was quantized: --base DIR. If this is the original, quantizing it again rounded differently "
        f"(then with {change}): run it once with that version on such a device, restore the old cache, or train again"
    )


def data_hashes(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of each data file by path; for a folder, one over the hashes of its files."""
    files = [str(path) for path, _ in as_pairs(recipe.data.train_files)]
    files += [] if recipe.data.eval is None else [recipe.data.eval]
    return {file: _data_hash(Path(file)) for file in files}


def _data_hash(path: Path) -> str:
    return sha256("\n".join(file_identity(path)).encode()).hexdigest() if path.is_dir() else hash_file(path)


def refuse_other_data(run: RunDir, now: Mapping[str, str]) -> None:
    """Raise RunError if a data file has changed since the run began."""
    then = run.read_json("env.json").get("data_sha256", now)
    changed = [
        f"{file} (SHA-256 {then[file][:12]}..., now {digest[:12]}...)"
        for file, digest in now.items()
        if then.get(file, digest) != digest
    ]
    if changed:
        raise RunError(
            f"{run.path}: cannot resume, the data have changed since the run began: {', '.join(changed)}. Restore the file, "
            "or start a new run"
        )


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect results."""
    return {name: version(name) for name in PACKAGES}


def computed_with(recipe: Recipe, card: Card) -> dict[str, Any]:
    """Return the entries of a checkpoint's manifest about its computation: recipe, device, threads, versions."""
    return {
        "recipe_sha256": fixed_sha256(recipe),
        "device": card.in_words,
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
    }


def fixed_sha256(recipe: Recipe) -> str:
    """Return the hash of the resolved recipe without the keys that may change on resuming."""
    values = recipe.model_dump(mode="json")
    kept = {
        f"{section}.{key}": value
        for section, entries in values.items()
        for key, value in (entries.items() if isinstance(entries, dict) else [("", entries)])
        if not _may_differ(f"{section}.{key}") and (f"{section}.{key}", value) not in ((_CHUNK, 0), (_CHUNK, "auto"))
    }
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def computed_otherwise(checkpoint: Path, recipe: Recipe, card: Card) -> Iterator[str]:
    """Yield the reasons why resuming from `checkpoint` may not be bit-identical to an uninterrupted run."""
    then, now = read_manifest(checkpoint) or {}, computed_with(recipe, card)
    if then.get("device", now["device"]) != now["device"]:
        yield (
            f"the device was {then['device']}, is {now['device']} now: sums are added in another order, so the last bits differ, and "
            "dropout draws other random numbers"
        )
    if card.is_cpu and then.get("num_threads", now["num_threads"]) != now["num_threads"]:
        yield (
            f"the number of threads was {then['num_threads']}, is {now['num_threads']} now: sums are added in another order, so "
            f"the last bits may differ. OMP_NUM_THREADS={then['num_threads']} keeps them"
        )
    before = then.get("versions", {})
    changed = [
        f"{name} {before[name]} -> {new}" for name, new in now["versions"].items() if before.get(name, new) != new
    ]
    if changed:
        yield f"versions have changed, so the last bits may differ: {', '.join(changed)}"

"""Checks beyond types: files that must exist, and keys that contradict each other.

`find_data_file`, `find_base` and `find_adapter` make paths absolute; `contradictions` checks a whole typed recipe.
Each returns its problems as (key, sentence) and never stops at the first.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_lite.files.cache import default_cache
from qlora_lite.files.json_text import parse_json
from qlora_lite.files.library_names import ADAPTER_CONFIG_FILE, STARTS_ON_BASE
from qlora_lite.limits import JSON_BYTES
from qlora_lite.recipe import hub_names, wording
from qlora_lite.recipe.schema import ON_DEVICE, Recipe
from qlora_lite.recipe.shipped import SHIPPED_MODELS

KeyProblem = tuple[str, str]
Rule = tuple[bool, tuple[str, ...], str]  # (whether it is broken, the keys, the sentence)
ATTENTION_ADVICE = "use auto or sdpa"  # the supported values of model.attention
_SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json")


def find_file(text: str, folders: Sequence[Path]) -> tuple[str | None, list[str]]:
    """Search `folders` for the path `text` -> (absolute path of the first match or None, every path tried)."""
    looked = list(dict.fromkeys(os.path.abspath(os.path.join(folder, os.path.expanduser(text))) for folder in folders))
    return next((path for path in looked if os.path.exists(path)), None), looked


def find_data_file(key: str, text: str, folders: Sequence[Path]) -> tuple[str, list[KeyProblem]]:
    """`data.train` or `data.eval` -> (absolute path, []); (the text itself, [problem]) when the file is missing."""
    path, looked = find_file(text, folders)
    if path is None:
        return text, [(key, f"no such file; looked at {_places(looked)}{_similar_file(looked)}")]
    if os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, name)) for name in _SAVED_BY_DATASETS):
        shown = wording.printable_path(path)
        return path, [
            (key, f"{shown} is a folder, but not one written by datasets' save_to_disk; expected a data file")
        ]
    if not os.access(path, os.R_OK):
        return path, [(key, f"{wording.printable_path(path)} is not readable; change its permissions")]
    return path, []


_OTHER_STARTS = ("pissa", "olora", "loftq", "corda", "eva")  # peft's other initializations
_WHY_NOT = (
    "is not supported: PiSSA, OLoRA, LoftQ and CorDA move part of the weights into the factors and change the frozen base, which "
    "is one hashed file shared by training, resuming and merging; EVA needs activations first. Use null (B = 0), or the "
    "folder of an adapter"
)


def find_adapter(text: str, folders: Sequence[Path]) -> tuple[str, list[KeyProblem]]:
    """`lora.init_from` -> (absolute path of an adapter folder, []); (the text itself, [problem]) when it is missing."""
    path, looked = find_file(text, folders)
    if path is None and text.lower().split("_")[0] in _OTHER_STARTS:
        return text, [("lora.init_from", f"{wording.quoted(text)} {_WHY_NOT}")]
    if path is None:
        return text, [("lora.init_from", f"no such folder; looked at {_places(looked)}{_similar_file(looked)}")]
    if not os.path.isfile(os.path.join(path, ADAPTER_CONFIG_FILE)):
        below = os.path.join(path, "adapter")
        is_run = os.path.isfile(os.path.join(below, ADAPTER_CONFIG_FILE))
        hint = f"; did you mean {wording.printable_path(below)}?" if is_run else ""
        return path, [
            (
                "lora.init_from",
                f"{wording.printable_path(path)} is not an adapter: {ADAPTER_CONFIG_FILE} is missing{hint}",
            )
        ]
    return path, []


def adapter_differences(recipe: Recipe) -> list[KeyProblem]:
    """Return the keys on which the recipe and the adapter at `lora.init_from` (PEFT's format) disagree.

    Reads only the adapter's config: layers and shapes are checked when its tensors are loaded.
    """
    assert recipe.lora.init_from is not None
    path = os.path.join(recipe.lora.init_from, ADAPTER_CONFIG_FILE)
    try:
        with open(path, "rb") as file:
            config = parse_json(file.read(JSON_BYTES))
    except (OSError, ValueError) as error:
        return [("lora.init_from", f"{wording.printable_path(path)} is not valid JSON ({error})")]
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        return [("lora.init_from", f"{wording.printable_path(path)} is not the config of a LoRA adapter")]
    problems = []
    for key, default in (("r", None), ("lora_alpha", None), ("use_rslora", False), ("use_dora", False)):
        recipe_value, adapter_value = getattr(recipe.lora, key), config.get(key, default)
        if recipe_value != adapter_value:
            sentence = (
                f"{wording.got(recipe_value)}, but the adapter of lora.init_from has {wording.got(adapter_value)}; "
                "use the adapter's value"
            )
            problems.append((f"lora.{key}", sentence))
    if config.get("init_lora_weights", True) not in STARTS_ON_BASE:
        start = wording.got(config["init_lora_weights"])
        problems.append(
            (
                "lora.init_from",
                f"was trained on weights that its initialization changed (init_lora_weights {start}), not on this base",
            )
        )
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        sentence = (
            "some layers have their own rank or alpha (rank_pattern, alpha_pattern), which a recipe cannot express"
        )
        problems.append(("lora.init_from", sentence))
    return problems


def find_base(text: str, folders: Sequence[Path], *, revision: str | None) -> tuple[str, list[KeyProblem]]:
    """`model.base` -> (a shipped or hub name unchanged, or the absolute path of a folder or .gguf file; problems).

    An existing folder `org/name` takes precedence over the hub, unless `model.revision` is set.
    """
    if text in SHIPPED_MODELS:
        return text, []
    path, looked = find_file(text, folders)
    is_hub_name = hub_names.is_hub_name(text)
    if path is not None and not (is_hub_name and revision is not None):
        if os.path.isfile(path) and not path.lower().endswith(".gguf"):
            return path, [
                ("model.base", f"{wording.printable_path(path)} is a file; expected a folder or a .gguf file")
            ]
        return path, []
    if is_hub_name:
        return text, _not_fetched(text, revision, looked)
    near = wording.nearest(text, list(SHIPPED_MODELS))
    hint = f"; did you mean {near}?" if near else f"{_similar_file(looked)}; shipped names: {', '.join(SHIPPED_MODELS)}"
    return text, [("model.base", f"no such folder or .gguf file; looked at {_places(looked)}{hint}")]


def _not_fetched(repo: str, revision: str | None, looked: Sequence[str]) -> list[KeyProblem]:
    if revision is not None and not hub_names.is_revision(revision):
        return [("model.revision", f"expected a branch, tag or commit, got {wording.quoted(revision)}")]
    if hub_names.find_fetched(repo, revision, cache=default_cache()) is not None:
        return []
    at = f" at revision {revision}" if revision else ""
    command = hub_names.fetch_command(repo, revision)
    sentence = f"no folder {repo}, and not fetched from the hub{at}; fetch it with: {command}"
    return [("model.base", sentence + _similar_file(looked))]


def _homes_rules(recipe: Recipe) -> list[Rule]:
    """Return the rules for chunks and for parts of the model on the host, as in `contradictions`."""
    movable = {key: value for key, value in ON_DEVICE.items() if key != "stream_from"}
    asked = [key for key, value in movable.items() if getattr(recipe.memory, key) not in ("auto", value)]
    keeps = recipe.memory.gradient_checkpointing not in ("auto", True)
    rules: list[Rule] = []
    for key in asked:
        name = f"memory.{key}"
        full = "is for frozen weights, but method full trains them; use auto, or method: qlora"
        rules.append((recipe.method == "full", (name, "method"), full))
        recomputes = (
            "computes every layer again in the backward pass; set memory.gradient_checkpointing to auto or true"
        )
        rules.append((keeps, (name, "memory.gradient_checkpointing"), recomputes))
        if key in ("embeddings", "head"):
            trained = "is for a frozen embedding and head, and lora.modules_to_save may train them; use auto"
            rules.append((bool(recipe.lora.modules_to_save), (name, "lora.modules_to_save"), trained))
    dora = "keeps weights in the base's files, and DoRA reads them all at the start; use host"
    rules.append(
        (recipe.lora.use_dora and recipe.memory.stream_from == "disk", ("memory.stream_from", "lora.use_dora"), dora)
    )
    return rules


def contradictions(recipe: Recipe) -> list[tuple[tuple[str, ...], str]]:
    """Return keys that are valid alone but not together -> (the keys, the one to correct first; the sentence)."""
    model, lora, train = recipe.model, recipe.lora, recipe.train
    repeated = [token for token, count in Counter(recipe.data.special_tokens).items() if count > 1]
    rules: list[Rule] = [
        (
            bool(repeated),
            ("data.special_tokens",),
            f"lists {' and '.join(map(wording.quoted, repeated))} more than once; each token needs one embedding row: keep one",
        ),
        (
            model.revision is not None and not hub_names.is_hub_name(model.base),
            ("model.revision", "model.base"),
            "is for hub models, and model.base is not a hub name; use null",
        ),
        (
            train.epochs is None and train.max_steps is None,
            ("train.epochs", "train.max_steps"),
            "null, and so is train.max_steps: training has no end; set one of them",
        ),
        (
            recipe.method != "full" and lora.target_modules == (),
            ("lora.target_modules", "method"),
            "an empty list, so no layer gets factors; use all-linear or name layers",
        ),
        (
            recipe.method == "qlora" and recipe.model.quantization == "none",
            ("model.quantization", "method"),
            "none, but method qlora needs a quantized base; use method: lora, or nf4",
        ),
        (
            recipe.method == "full" and lora.init_from is not None,
            ("lora.init_from", "method"),
            "starts from an adapter, but method full trains the weights themselves; use null, or method: qlora",
        ),
        *(
            (
                recipe.method == "full" and is_set,
                (key, "method"),
                "applies to factors, but method full trains the weights themselves; remove it, or use method: qlora",
            )
            for key, is_set in (
                ("lora.use_dora", lora.use_dora),
                ("lora.modules_to_save", bool(lora.modules_to_save)),
                ("lora.lora_dropout", lora.lora_dropout > 0),
                ("train.loraplus_ratio", train.loraplus_ratio != 1),
            )
        ),
        (
            train.eval_every_steps is not None and recipe.data.eval is None,
            ("train.eval_every_steps", "data.eval"),
            "needs held-out rows; give data.eval a file, or use null",
        ),
        (
            train.early_stop is not None and train.eval_every_steps is None,
            ("train.early_stop", "train.eval_every_steps"),
            "needs evaluations during training; set train.eval_every_steps, or use null",
        ),
    ]
    return [(keys, sentence) for is_broken, keys, sentence in (*rules, *_homes_rules(recipe)) if is_broken]


def refusals(values: dict[str, Any], sources: dict[str, str]) -> list[KeyProblem]:
    """Typed values and their source text, both by full key -> a problem for each value this version does not support."""
    sentence = f"is not supported in this version; {ATTENTION_ADVICE}"
    return [
        (key, f"{wording.got(value, sources.get(key, ''))} {sentence}")
        for key, value in values.items()
        if is_refused(key, value)
    ]


def is_refused(key: str, value: Any) -> bool:
    """Whether the recipe format allows this value but this version does not support it."""
    return key == "model.attention" and value not in ("auto", "sdpa")


def _places(looked: Sequence[str]) -> str:
    return " and ".join(wording.printable_path(path) for path in looked)


def _similar_file(looked: Sequence[str]) -> str:
    """Return `; did you mean train.json?` when a folder that was searched has a file of a similar name, else ""."""
    for path in looked:
        try:
            names = os.listdir(os.path.dirname(path))
        except (OSError, ValueError):
            continue  # no such folder
        near = wording.nearest(os.path.basename(path), names[:10_000])
        if near:
            return f"; did you mean {wording.printable_path(os.path.join(os.path.dirname(path), near))}?"
    return ""

"""`adapter_config.json` of a LoRA adapter in PEFT's format, checked before peft or a merge acts on it.

In: an adapter's folder. Out: its settings as a dict with checked types and ranges. Refused by name: unsupported settings that change the
meaning of the factors; settings that make peft import a module or read a file (megatron_core, auto_mapping, ...); layer patterns that a
regular expression could take for ever to match.
"""

import re
from pathlib import Path
from typing import Any

from qlora_lite.base.source import read_json
from qlora_lite.errors import ModelError
from qlora_lite.files.library_names import ADAPTER_CONFIG_FILE, STARTS_ON_BASE
from qlora_lite.limits import ADAPTER_RANK, PATTERN_CHARS, VOCABULARY

# Settings that affect where and how factors were trained, but not the change that they add.
_INERT = {
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "peft_type", "bias"),
    *("init_lora_weights", "modules_to_save", "trainable_token_indices"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "eva_config"),
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
    *("megatron_core", "qalora_group_size"),  # their defaults are not empty; they act only with other settings
}
_FLAGS = ("use_rslora", "use_dora", "inference_mode")
_TEXTS = ("base_model_name_or_path", "revision", "task_type", "peft_version", "megatron_core")
_NAMES = ("modules_to_save", "target_modules", "exclude_modules", "layers_pattern")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of the adapter in `folder`. Raises ModelError naming all that are wrong or not supported."""
    path = folder / ADAPTER_CONFIG_FILE
    config = read_json(path)
    problems = [*_unsupported(config), *_malformed(config)]
    if problems:
        lines = [f"  {problem}" for problem in problems]
        raise ModelError("\n".join([f"{folder}: the adapter has settings that a merge does not support", *lines]))
    return config


def token_ids_of(config: dict[str, Any]) -> dict[str, list[int]]:
    """`trainable_token_indices` by the ending of a module's name; a list is for the embedding, as in peft."""
    given = config.get("trainable_token_indices") or {}
    return given if isinstance(given, dict) else {"embed_tokens": given}


def _unsupported(config: dict[str, Any]) -> list[str]:
    problems = [f"{key}: {_shown(value)}" for key, value in sorted(config.items()) if value and key not in _INERT]
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type: {_shown(config.get('peft_type'))} (only LORA)")
    if config.get("bias", "none") != "none":
        problems.append(f"bias: {_shown(config['bias'])} (only none)")
    if config.get("init_lora_weights", True) not in STARTS_ON_BASE:
        problems.append(f"init_lora_weights: {_shown(config['init_lora_weights'])} (changes the base weights)")
    problems += [f"{key}: missing" for key in ("r", "lora_alpha") if key not in config]
    return problems


def _malformed(config: dict[str, Any]) -> list[str]:
    """Values of a wrong type or out of range."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    ids = config.get("trainable_token_indices") or {}
    lists_of_ids = list(ids.values()) if isinstance(ids, dict) else [ids]
    names = [config.get(key) for key in _NAMES]
    checks = [
        ("r", _is_rank(config.get("r", 1)), f"a whole number from 1 to {ADAPTER_RANK:,}"),
        ("lora_alpha", _is_number(config.get("lora_alpha", 1)), "a number above 0"),
        ("lora_dropout", _is_share(config.get("lora_dropout") or 0.0), "a number from 0 to 1"),
        *((key, isinstance(config.get(key) or False, bool), "true or false") for key in _FLAGS),
        *((key, isinstance(config.get(key) or "", str), "text") for key in _TEXTS),
        ("rank_pattern", _is_pattern(ranks) and all(map(_is_rank, ranks.values())), "ranks by layer"),
        ("alpha_pattern", _is_pattern(alphas) and all(map(_is_number, alphas.values())), "numbers by layer"),
        *((key, _are_names(given), "names, or a plain pattern") for key, given in zip(_NAMES, names, strict=True)),
        ("trainable_token_indices", all(map(_are_ids, lists_of_ids)), f"different token ids below {VOCABULARY:,}"),
        ("layers_to_transform", _are_layers(config.get("layers_to_transform")), "whole numbers"),
        ("auto_mapping", isinstance(config.get("auto_mapping") or {}, dict), "an object"),
        ("eva_config", isinstance(config.get("eva_config") or {}, dict), "an object"),
    ]
    return [
        f"{key}: expected {expected}, got {_shown(config.get(key))}"
        for key, is_right, expected in checks
        if not is_right
    ]


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= ADAPTER_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _is_pattern(given: Any) -> bool:
    return isinstance(given, dict) and all(map(_is_plain, given))


def _are_names(given: Any) -> bool:
    if given is None or isinstance(given, str):
        return given is None or _is_plain(given)
    return isinstance(given, list) and all(isinstance(name, str) and _is_plain(name) for name in given)


def _are_ids(given: Any) -> bool:
    is_ids = isinstance(given, list) and all(type(one) is int and 0 <= one < VOCABULARY for one in given)
    return is_ids and len(set(given)) == len(given)


def _are_layers(given: Any) -> bool:
    layers = given if isinstance(given, list) else [0 if given is None else given]
    return all(type(layer) is int and abs(layer) < 2**31 for layer in layers)


def _is_plain(pattern: str) -> bool:
    """Whether peft, which reads names as regular expressions, matches this one quickly: few repetitions, none of a group."""
    if len(pattern) > PATTERN_CHARS or len(re.findall(r"[*+{]", pattern)) > 4 or re.search(r"\)[*+{]", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:119] + "…"

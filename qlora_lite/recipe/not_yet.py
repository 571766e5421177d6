"""What the recipe format can say but this version does not carry out: refused by name, never ignored.

One row per refusal; the issue that builds the thing deletes its row (and nothing else here).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NotYet:
    """`refuses(value)` is true for the values of `key` that are still missing; `instead` says what to write."""

    key: str
    refuses: Callable[[Any], bool]
    instead: str
    why: str = "is not in this version"


def is_hub_name(base: Any) -> bool:
    """`org/name`, as the Hugging Face hub writes it; a path that was found is absolute and so never one."""
    looks_so = isinstance(base, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]*[\w-]", base) is not None
    return looks_so and not base.lower().endswith((".gguf", ".json", ".safetensors"))


def _is_none_of(*carried_out: Any) -> Callable[[Any], bool]:
    return lambda value: value not in carried_out


NOT_YET: tuple[NotYet, ...] = (
    NotYet("method", _is_none_of("qlora"), "use qlora"),
    NotYet(
        "model.base",
        is_hub_name,
        "give a folder, a .gguf or a shipped name",
        why="is no folder here, so it would be a hub name, and fetch is not in this version",
    ),
    NotYet("model.revision", _is_none_of(None), "use null", why="belongs to fetch, which is not in this version"),
    NotYet("model.quantization", _is_none_of("nf4"), "use nf4"),
    NotYet("model.double_quant", _is_none_of(True), "use true"),
    NotYet("model.attention", _is_none_of("auto", "sdpa"), "use auto or sdpa"),
    NotYet("lora.use_dora", _is_none_of(False), "use false"),
    NotYet("lora.init_from", _is_none_of(None), "use null"),
    NotYet("lora.modules_to_save", _is_none_of(()), "use []"),
    NotYet("data.share_prefixes", _is_none_of("auto", False), "use auto, which means off for now"),
    NotYet("train.loraplus_ratio", _is_none_of(1.0), "use 1.0"),
    NotYet("train.eval_every_steps", _is_none_of(None), "use null; scores are taken before and after training"),
    NotYet("train.early_stop", _is_none_of(None), "use null"),
    NotYet("memory.budget", _is_none_of("auto"), "use auto", why="needs the planner, which is not in this version"),
    NotYet("merge.base", _is_none_of("dequantized"), "use dequantized, which is what training saw"),
)


def refusal(key: str, value: Any) -> str | None:
    """The rest of the sentence "method: "lora" ..." for a value that is not carried out; None for one that is."""
    for row in NOT_YET:
        if row.key == key and row.refuses(value):
            return f"{row.why}; {row.instead}"
    return None

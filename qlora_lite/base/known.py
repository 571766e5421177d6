"""Well-known models by short names: what a plan needs to know of a model that is not on this machine.

    in    llama-3.1-8b, or the hub name it stands for, meta-llama/Llama-3.1-8B-Instruct
    out   its published number of weights and its config, as the loader would have it from the model's own folder

Shapes come from the table in known_shapes.py: nothing is fetched, and only `known_config` imports transformers.
"""

from copy import deepcopy
from typing import TYPE_CHECKING

from qlora_lite.base.known_shapes import SHAPES, KnownShape
from qlora_lite.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KNOWN: tuple[str, ...] = tuple(SHAPES)
_NAMES = {name: name for name in KNOWN} | {shape.source.lower(): name for name, shape in SHAPES.items()}


def known_name(base: str) -> str | None:
    """The short name of what a recipe calls its base, a short name or a hub name; None for any other."""
    return _NAMES.get(base.lower())


def known_shape(base: str) -> KnownShape:
    """The row of the table. Raises ModelError with the nearest name for a model that is not in it."""
    name = known_name(base)
    if name is None:
        raise ModelError(_unknown(base))
    return SHAPES[name]


def known_config(base: str) -> "PreTrainedConfig":
    """The language model's config, the caller's own to change. Raises ModelError as `known_shape` does."""
    from transformers import AutoConfig

    shape = known_shape(base)
    config: PreTrainedConfig = AutoConfig.for_model(**deepcopy(shape.config))  # so that the table stays as it is
    config.name_or_path = shape.source
    return config


def _unknown(base: str) -> str:
    from qlora_lite.recipe import wording

    near = wording.nearest(base, list(_NAMES))
    hint = f"did you mean {_NAMES[near]}? " if near else ""
    return f"no built-in shape is called {wording.quoted(base)}; {hint}There are: {', '.join(KNOWN)}"

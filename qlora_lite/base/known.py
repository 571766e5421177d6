"""Well-known models by short names: shapes for plans of models that are not on this machine.

    in    llama-3.1-8b, or its hub name, meta-llama/Llama-3.1-8B-Instruct
    out   its published number of weights, and its config as the loader would read it from the model's folder

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
    """Short name or hub name of a base -> its short name; None for any other base."""
    return _NAMES.get(base.lower())


def known_shape(base: str) -> KnownShape:
    """Look up a model in the table. Raises ModelError, with the nearest name, for an unknown model."""
    name = known_name(base)
    if name is None:
        raise ModelError(_unknown(base))
    return SHAPES[name]


def known_config(base: str) -> "PreTrainedConfig":
    """Return a new config of the language model. Raises ModelError as `known_shape` does."""
    from transformers import AutoConfig

    shape = known_shape(base)
    config: PreTrainedConfig = AutoConfig.for_model(**deepcopy(shape.config))  # a copy: protects the table
    config.name_or_path = shape.source
    return config


def _unknown(base: str) -> str:
    from qlora_lite.recipe import wording

    near = wording.nearest(base, list(_NAMES))
    hint = f"did you mean {_NAMES[near]}? " if near else ""
    return f"no built-in shape named {wording.quoted(base)}; {hint}Known: {', '.join(KNOWN)}"
